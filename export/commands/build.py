"""The `build`, `engines` and `export` commands: engines made once for this machine, listed, removed and passed on."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vstar_engine.artifacts.built_engine import MAX_BATCH, size_words
from vstar_engine.backends import BACKENDS, EAGER, TENSORRT
from vstar_engine.commands.model_options import add_lora_option, add_text_options
from vstar_engine.commands.weights_options import with_weights
from vstar_engine.config.models import model_named, parse_size
from vstar_engine.config.request import MAX_FRAMES
from vstar_engine.export.build_engine import build, place
from vstar_engine.export.build_settings import COMPATIBILITY, LEVELS, OPSET, REFIT, TENSORRT_FRAMES, Settings
from vstar_engine.export.builders import builder_named
from vstar_engine.loading import open_weights
from vstar_engine.machine.device import device_named, dtype_named
from vstar_engine.model_choice import ModelChoice
from vstar_engine.weights.bundled import stated_spec

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
    add_lora_option(parser)
    parser.add_argument(
        "--frames",
        metavar="N,N,...",
        help=f"lengths to build for (default: {ANY} up to {MAX_FRAMES}; TensorRT: {','.join(map(str, TENSORRT_FRAMES))})",
    )
    parser.add_argument("--size", metavar="HEIGHTxWIDTH", help=f"pixels, or {ANY} (default: the model's own)")
    parser.add_argument(
        "--batch", type=int, default=MAX_BATCH, help="most rows at once; guidance takes 2 (default %(default)s)"
    )
    parser.add_argument("--opset", type=int, default=OPSET, help="of ONNX files (default %(default)s)")
    parser.add_argument(
        "--inline", action="store_true", help="ONNX files of standard operators alone, for OpenVINO, DirectML and others"
    )
    add_tensorrt_options(parser)
    parser.add_argument("--out", type=Path, help="the engine's folder (default: one named by its content among `engines`)")
    parser.add_argument("--force", action="store_true", help="build anew where the engine is there already")
    parser.add_argument("--dry-run", action="store_true", help="print what would be built and what it takes, and stop")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_tensorrt_options(parser: argparse.ArgumentParser) -> None:
    """Adds what TensorRT alone takes."""
    ours = parser.add_argument_group("TensorRT")
    ours.add_argument("--plugin", default=Settings.plugin, help="aot, cpp, python, none or %(default)s (default)")
    ours.add_argument(
        "--workspace", type=int, default=Settings.workspace, metavar="MIB", help="most memory of a kernel (default %(default)s)"
    )
    ours.add_argument(
        "--level", type=int, choices=LEVELS, default=Settings.level, help="of optimisation; a higher one builds longer"
    )
    ours.add_argument("--refit", choices=REFIT, default=Settings.refit, help="let weights be swapped; stripped: leave them out")
    ours.add_argument("--compatibility", choices=COMPATIBILITY, default=Settings.compatibility, help="GPUs that may run it")
    ours.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="kept timings (default: one for GPU, version and kernel)"
    )
    ours.add_argument("--targets", default="", metavar="SM80,...", help="for RTX: GPUs to prepare for")


def settings_from(args: argparse.Namespace) -> Settings:
    """Checks the options and makes settings of them."""
    spec, dtype = stated_spec(model_named(args.model), args.weights), dtype_named(args.dtype)
    if spec.streaming is not None:
        raise ValueError(f"model {spec.name} runs in eager PyTorch; engines are built of models that make a video in one piece")
    size = None if args.size == ANY else parse_size(args.size) if args.size else spec.size
    device = device_named(args.device, dtype)
    if args.frames == ANY and args.backend in TENSORRT:
        raise ValueError(f"backend {args.backend} tunes for lengths: name them, such as --frames 16,32, got {ANY}")
    frames, targets = parse_frames(args.frames or ANY), tuple(part for part in args.targets.split(",") if part)
    taken = ("backend", "batch", "opset", "inline", "plugin", "workspace", "level", "refit", "compatibility", "timing_cache")
    given = {name: getattr(args, name) for name in taken}
    return Settings(spec, dtype=dtype, device=device, frames=frames, size=size, targets=targets, **given)


def run(args: argparse.Namespace) -> int:
    """Runs `build`."""
    args.weights = with_weights(ModelChoice(args.model, args.weights, dtype=args.dtype), args.yes).weights
    settings = settings_from(args)
    builder_named(settings.backend)
    weights = open_weights(settings.spec, args.weights, args.lora or ())
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
    builder = builder_named(settings.backend)
    guess = builder.estimate(settings)
    plan = {
        "folder": str(folder),
        "model": settings.spec.name,
        "backend": settings.backend,
        "dtype": args.dtype,
        "device": args.device,
        "frames": list(settings.frames) or f"1 to {settings.most_frames}",
        "size": size_words(settings.size),
        "batch": f"1 to {settings.batch}",
        **builder.options(settings),
        **({"profiles": builder.profiles(settings)} if settings.backend in TENSORRT else {}),
        "seconds": round(guess.seconds),
        "disk_mib": round(guess.disk / MIB),
        "memory_mib": round(guess.memory / MIB),
        "basis": guess.basis,
    }
    if args.json:
        print(json.dumps(plan))
    else:
        print("\n".join(f"{name:15}{_words(value)}" for name, value in plan.items()))
        print("seconds, disk and memory are rough guesses from the basis; nothing was built")
    return 0


def _words(value: Any) -> str:
    """Writes a part of a plan: lists with commas, a profile of axes on each line."""
    if isinstance(value, tuple):
        each = [", ".join(f"{axis} {low} to {high}" for axis, (low, _, high) in ranges.items()) for ranges in value]
        return f"\n{'':15}".join(each)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
