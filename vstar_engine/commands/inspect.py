"""The `inspect` command: prints the settings that made a video, and the command that makes it again."""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from vstar_engine.config.sampling import FP8
from vstar_engine.weights.bundled import BUNDLED

from .video_options import words_of


def command_for(provenance: dict[str, Any]) -> str:
    """Returns the shell command that makes a video again; DIR stands for a folder of weights that has no place on the Hub."""
    request, words = provenance["request"], ["vstar-engine", "generate"]
    words += ["--model", provenance["model"], "--device", provenance["device"], "--dtype", provenance["dtype"]]
    if isinstance(hub := provenance.get("weights_from"), dict):
        words += ["--weights", f"{hub.get('id')}@{hub.get('commit')}{':' + hub['file'] if hub.get('file') else ''}"]
    elif provenance["model"] not in BUNDLED:
        words += ["--weights", "DIR"]
    words += [f"--lora={one['lora']}" for one in provenance.get("loras", ())]
    without: tuple[str, ...] = ("negative",) if request.get("negatives") else ()
    if first := provenance.get("first_chunk"):
        words.append(f"--start={first['file']}" if "file" in first else f"--first-model={first['model']}")
        if request.get("endless"):
            request = {**request, "frames": "inf"}
    if "embeddings" in provenance:
        words.append(f"--embeddings={provenance['embeddings']}")
        without = ("states", "negative", "negatives")
    if FP8 in provenance:  # a way to load the network, which one option names with those to sample with it
        sampling = request["sampling"]
        request = {**request, "sampling": {**sampling, "fast": [*sampling.get("fast", ()), FP8]}}
    return shlex.join([*words, *words_of(request, without)])


def lacking(provenance: dict[str, Any]) -> list[str]:
    """Names what a command needs and a file of another version, or one that other hands have touched, does not have."""
    request = provenance.get("request")
    if not isinstance(request, dict):
        request = {}
    told = ["states"] if "embeddings" not in provenance else []
    missing = [name for name in ("model", "device", "dtype") if not isinstance(provenance.get(name), str)]
    return missing + [f"request.{name}" for name in (*told, "frames", "size", "seed") if request.get(name) is None]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)


def run(args: argparse.Namespace) -> int:
    from vstar_engine.video import read_provenance

    provenance = read_provenance(args.file)
    print(json.dumps(provenance, indent=2))
    if missing := lacking(provenance):
        print(f"no command makes it again: the file says nothing of {', '.join(missing)} (another version wrote it)")
    else:
        print(command_for(provenance))
    return 0
