"""The `build`, `engines` and `export` commands: engines made once for this machine, listed, removed and passed on."""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .artifacts import kernel_hash
from .backends import BACKENDS, EAGER, backend_named
from .built import Artifact, engines, engines_root, remove, size_words
from .config import model_named, parse_size
from .device import device_named, dtype_named
from .engine import open_weights
from .errors import EngineError
from .export import EXPORTERS, builder_named, exporter_named
from .export.building import build, place
from .export.settings import MAX_BATCH, OPSET, REFIT, Settings
from .generate import add_text_options

MIB, GIB = 2**20, 2**30
ANY = "any"


def parse_frames(text: str) -> tuple[int, ...]:
    """Reads 16,32,64 as lengths, and `any` as none in particular."""
    if text == ANY:
        return ()
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise ValueError(f"frames are numbers such as 16,32,64, or {ANY}, got {text!r}") from error


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `build`."""
    built = [name for name in BACKENDS if name != EAGER]
    parser.add_argument("--backend", required=True, help=f"one of {', '.join(built)}")
    add_text_options(parser)
    parser.add_argument("--frames", default=ANY, metavar="N,N,...", help="lengths to build for (default %(default)s up to 512)")
    parser.add_argument("--size", metavar="HEIGHTxWIDTH", help=f"pixels, or {ANY} (default: the model's own)")
    parser.add_argument(
        "--batch", type=int, default=MAX_BATCH, help="most rows at once; guidance takes 2 (default %(default)s)"
    )
    parser.add_argument("--opset", type=int, default=OPSET, help="of ONNX files (default %(default)s)")
    parser.add_argument("--plugin", default=Settings.plugin, help="TensorRT: aot, cpp, python, none or %(default)s (default)")
    parser.add_argument("--targets", default="", metavar="SM80,...", help="TensorRT for RTX: GPUs to prepare for")
    parser.add_argument("--refit", choices=REFIT, default=Settings.refit, help="TensorRT: let weights be swapped later")
    parser.add_argument("--out", type=Path, help="the engine's folder (default: one named by its content among `engines`)")
    parser.add_argument("--force", action="store_true", help="build anew where the engine is there already")
    parser.add_argument("--dry-run", action="store_true", help="print what would be built and what it takes, and stop")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def settings_from(args: argparse.Namespace) -> Settings:
    """Checks the options and makes settings of them."""
    spec, dtype = model_named(args.model), dtype_named(args.dtype)
    size = None if args.size == ANY else parse_size(args.size) if args.size else spec.size
    device = device_named(args.device, dtype)
    frames, targets = parse_frames(args.frames), tuple(part for part in args.targets.split(",") if part)
    return Settings(spec, args.backend, dtype, device, frames, size, args.batch, args.opset, args.plugin, targets, args.refit)


def run(args: argparse.Namespace) -> int:
    """Runs `build`."""
    settings = settings_from(args)
    builder_named(settings.backend)
    weights = open_weights(settings.spec, args.weights)
    if args.dry_run:
        return _plan(args, settings, place(settings, weights, args.out))
    start = time.perf_counter()

    def report(line: str) -> None:
        tqdm.write(f"[{time.perf_counter() - start:6.1f} s] {line}", file=sys.stderr)

    artifact = build(settings, weights, args.out, args.force, report)
    if args.json:
        print(json.dumps({"folder": str(artifact.folder), **artifact.manifest}))
        return 0
    peak = artifact.manifest["peak_memory"] / GIB
    taken = f"{artifact.bytes / MIB:.0f} MiB, {artifact.manifest['seconds']:.0f} s, at most {peak:.1f} GiB of memory"
    print(f"{artifact.folder}: {taken}\nvstar-engine generate --engine {artifact.folder} ...")
    return 0


def _plan(args: argparse.Namespace, settings: Settings, folder: Path) -> int:
    guess = builder_named(settings.backend).estimate(settings)
    plan = {
        "folder": str(folder),
        "model": settings.spec.name,
        "backend": settings.backend,
        "dtype": args.dtype,
        "device": args.device,
        "frames": list(settings.frames) or f"1 to {settings.most_frames}",
        "size": size_words(settings.size),
        "batch": f"1 to {settings.batch}",
        "seconds": round(guess.seconds),
        "disk_mib": round(guess.disk / MIB),
        "memory_mib": round(guess.memory / MIB),
    }
    if args.json:
        print(json.dumps(plan))
    else:
        print("\n".join(f"{name:12}{value}" for name, value in plan.items()))
        print("seconds, disk and memory are guesses; nothing was built")
    return 0


def add_engines_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `engines`."""
    parser.add_argument("action", nargs="?", choices=("list", "rm"), default="list")
    parser.add_argument("name", nargs="*", help="engines to remove: names or folders")
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run_engines(args: argparse.Namespace) -> int:
    """Lists the engines built here, or removes some."""
    if args.action == "rm":
        if not args.name:
            raise ValueError("name the engines to remove: vstar-engine engines rm NAME")
        for name in args.name:
            print(f"removed {remove(name)}")
        return 0
    if args.name:
        raise ValueError(f"`engines list` takes no names, got {', '.join(args.name)}")
    found = list(engines(engines_root()))
    if args.json:
        print(json.dumps([_row(artifact) for artifact in found]))
        return 0
    for artifact in found:
        row = _row(artifact)
        print(row["fault"] if "fault" in row else f"{row['bytes'] / MIB:8.0f} MiB  {row['made']}  {row['name']}")
    whole = sum(artifact.bytes for artifact in found if isinstance(artifact, Artifact))
    print(f"{len(found)} engines in {engines_root()}, {whole / GIB:.2f} GiB")
    return 0


def _row(artifact: Artifact | EngineError) -> dict[str, Any]:
    if isinstance(artifact, EngineError):
        return {"fault": str(artifact)}
    about = {name: artifact.manifest[name] for name in ("name", "made", "seconds")}
    return {**about, "folder": str(artifact.folder), "bytes": artifact.bytes, **artifact.identity}


def add_refit_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `refit`."""
    parser.add_argument("engine", metavar="DIR", help="engine made by `vstar-engine build --refit yes`, or its name")
    parser.add_argument("--weights", required=True, help="folder made by `vstar-engine convert`, of the same shapes")
    parser.add_argument("--out", type=Path, help="the new engine's folder (default: one named by its content)")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")


def run_refit(args: argparse.Namespace) -> int:
    """Swaps the weights of a built engine without building it again."""
    artifact = Artifact.open(args.engine)
    if artifact.identity["options"].get("refit", "no") == "no":
        raise EngineError(f"{artifact.folder} was not built for other weights; rebuild it: {artifact.command()} --refit yes")
    device = device_named("cuda", dtype_named(artifact.identity["dtype"]))
    artifact.check(kernel=kernel_hash(), **backend_named(artifact.identity["backend"]).machine(device))
    # what is written holds its weights, even where the source was stripped of them
    settings = replace(Settings.of(artifact.identity, device), refit="yes")
    weights = open_weights(settings.spec, args.weights)
    made = build(settings, weights, args.out, args.force, lambda line: tqdm.write(line, file=sys.stderr), artifact)
    print(f"{made.folder}: the engine of {artifact.name} with the weights of {args.weights}")
    return 0


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `export`."""
    parser.add_argument("kind", choices=EXPORTERS, help="a model repository of Triton Inference Server")
    parser.add_argument("engine", metavar="DIR", help="engine made by `vstar-engine build`, or its name")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--weights", help="folder made by `vstar-engine convert`, where the engine's has moved")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")


def run_export(args: argparse.Namespace) -> int:
    """Writes a built engine for another server."""
    artifact = Artifact.open(args.engine)
    weights = open_weights(model_named(artifact.identity["model"]), args.weights or artifact.manifest["weights_path"])
    artifact.check(weights=weights.fingerprint())
    exporter_named(args.kind).write(artifact, weights, args.out, args.force, lambda line: tqdm.write(line, file=sys.stderr))
    print(f"wrote {args.out}; tritonserver --model-repository={args.out}, with vstar-engine installed beside it")
    return 0
