"""The `inspect` command: the settings that a video carries, and the command that makes it again."""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from vstar_engine.config.sampling import FP8
from vstar_engine.weights.bundled import BUNDLED


def command_for(provenance: dict[str, Any]) -> str:
    """Returns the shell command that makes a video again; DIR stands for the weights whose source has the stated sha256."""
    request, words = provenance["request"], ["vstar-engine", "generate"]
    words += ["--model", provenance["model"], "--device", provenance["device"], "--dtype", provenance["dtype"]]
    if provenance["model"] not in BUNDLED:
        words += ["--weights", "DIR"]
    words += [f"--lora={one['lora']}" for one in provenance.get("loras", ())]
    words += _heard(provenance)
    height, width = request["size"]
    words += ["--frames", str(request["frames"]), "--size", f"{height}x{width}", "--seed", str(request["seed"])]
    sampling = request["sampling"]
    for name in ("steps", "guidance", "eta", "fps_condition"):
        words.append(f"--{name.replace('_', '-')}={sampling[name]}")
    if not sampling["batch_guidance"]:
        words.append("--no-batch-guidance")
    words += [f"--fast={name}" for name in [*sampling.get("fast", ()), *([FP8] if FP8 in provenance else [])]]
    words += ["--tar", "none"]
    if tar := request["tar"]:
        words += [f"--sigma={level}={sigma}" for level, sigma in tar["sigma"].items()]
        words += [f"--strength={tar['strength']}", f"--until={tar['until_step']}"]
    return shlex.join([*words, f"--fps={request['fps']}"])


def _heard(provenance: dict[str, Any]) -> list[str]:
    """Returns the options that say what the video hears, and when."""
    request = provenance["request"]
    if "embeddings" in provenance:
        words = ["--embeddings", provenance["embeddings"]]
    else:
        words = [f"--states={state}" for state in request["states"]]
        negatives = [f"--negatives={negative}" for negative in request.get("negatives", ())]
        words += negatives or [f"--negative={request['negative']}"]
    words += ["--mode", request["mode"]]
    # files of earlier versions say nothing of these
    words += [f"--at={place}" for place in request.get("at", ())]
    return words + [f"--durations={length}" for length in request.get("durations", ())]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)


def run(args: argparse.Namespace) -> int:
    from vstar_engine.video import read_provenance

    provenance = read_provenance(args.file)
    print(json.dumps(provenance, indent=2))
    print(command_for(provenance))
    return 0
