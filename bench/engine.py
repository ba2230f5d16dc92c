"""The engine around its networks: cold start, loading, the first step, building a package, size on disk and memory.

Every cold start is a process of its own; the files are in the system's cache after the first, which is not counted.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vstar_engine import bundled
from vstar_engine.config import MODELS, Spec, model_named
from vstar_engine.device import DTYPES, device_named, dtype_named
from vstar_engine.errors import CheckpointError

from . import built_step
from .contest import FAILURES, Pace, hold
from .ladder import AOTI, ENGINE, Step
from .rows import FAILED, WRONG, Row, Rows, sentence
from .scene import ERROR_BUDGET, Scene
from .seeded import relative_error
from .settings import add_common, open_rows
from .timing import summarise

SECONDS = ("process", "import", "load", "first_step", "second_step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the model and how often to start it."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    add_common(parser, rounds=3, limit=120.0)
    parser.add_argument("--model", choices=MODELS, default="mini", help="default %(default)s")
    parser.add_argument("--weights", type=Path, help="folder made by `vstar-engine convert`; mini needs none")
    parser.add_argument("--frames", type=int, default=16, help="default %(default)s")
    half = {"cuda": "float16", "cpu": "float32"}[there]
    parser.add_argument("--dtype", choices=DTYPES, default=half, help="default %(default)s")
    parser.add_argument("--device", default=there, help="default %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="leave out building the package")
    parser.add_argument("--engines", type=Path, nargs="+", metavar="DIR", help="set these built engines against eager instead")


def cold_start(args: argparse.Namespace) -> dict[str, Any]:
    """Starts the engine in a process of its own; RuntimeError with its last line where it fails."""
    given = [args.model, *([str(args.weights)] if args.weights else [])]
    flags = ["--frames", str(args.frames), "--device", args.device, "--dtype", args.dtype]
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "vstar_engine.bench.cold", *given, *flags], capture_output=True, text=True)
    taken = time.perf_counter() - begun
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(lines[-1])
    return {"process": taken, **json.loads(done.stdout.splitlines()[-1])}


def size_on_disk(spec: Spec, weights: Path | None) -> int:
    """Adds up the files of a folder of weights."""
    folder = weights or bundled.weights(spec)
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def run(args: argparse.Namespace) -> int:
    """Measures what the flags say; 1 if something failed."""
    if args.engines:
        with open_rows(args) as rows:
            pace = Pace.within(args.budget, rounds=args.rounds, limit=args.limit)
            hold(built_step.contest(args.engines, args.frames), rows, pace)
        return 1 if rows.failures else 0
    if args.rehearse:
        args.model, args.weights, args.frames, args.device, args.dtype, args.rounds = "mini", None, 2, "cpu", "float32", 1
    spec, dtype = model_named(args.model), dtype_named(args.dtype)
    device = device_named(args.device, dtype)
    if args.weights is not None and not args.weights.is_dir():
        raise CheckpointError(f"no weights at {args.weights}; give a folder made by `vstar-engine convert`")
    disk = size_on_disk(spec, args.weights)
    case = {"part": "cold start", "model": args.model, "frames": args.frames}
    with open_rows(args) as rows:
        try:
            measure_starts(args, Row("engine", case, "", args.dtype, str(device)), disk, rows)
            if not args.no_compile:
                scene = Scene(args.model, args.frames, spec.size, dtype, device)
                measure_build(scene, Row("engine", {**case, "part": "build"}, AOTI, args.dtype, str(device)), rows)
        except FAILURES as error:
            row = Row("engine", case, "eager", args.dtype, str(device))
            rows.write(replace(row, status=FAILED, note=sentence(error)))
    return 1 if rows.failures else 0


def measure_starts(args: argparse.Namespace, row: Row, disk: int, rows: Rows) -> None:
    """Starts the engine again and again; a row for each span of time, and one for what it holds."""
    if not args.rehearse:
        cold_start(args)
    starts = [cold_start(args) for _ in range(args.rounds)]
    for name in SECONDS:
        timing = summarise([start[name] for start in starts])
        numbers = {"median": timing.median, "p20": timing.p20, "p80": timing.p80, "rounds": timing.rounds}
        rows.write(replace(row, provider=name.replace("_", " "), numbers=numbers))
    held = {
        "disk_bytes": disk,
        **{name: max(s[name] for s in starts) for name in ("host_bytes", "device_bytes") if starts[0][name]},
    }
    rows.write(replace(row, provider="bytes", numbers=held))


@torch.no_grad()
def measure_build(scene: Scene, row: Row, rows: Rows) -> None:
    """Builds the step into a package once, holds its answer to the eager one's, and writes what building took."""
    step = Step(scene)
    packaged = step.call(ENGINE | {AOTI})
    begun = time.perf_counter()
    answer = packaged()
    first = time.perf_counter() - begun
    error = relative_error(answer, scene.wanted)
    facts = step.packages[ENGINE | {AOTI}]
    numbers = {**facts, "median": facts["export"] + facts["build"], "first_step": first, "error": error}
    numbers |= {"p20": numbers["median"], "p80": numbers["median"], "rounds": 1}
    if not error <= ERROR_BUDGET[scene.dtype]:
        words = f"relative L2 error {error:.3g}, wanted at most {ERROR_BUDGET[scene.dtype]:g}"
        rows.write(replace(row, status=WRONG, note=words))
    else:
        rows.write(replace(row, numbers=numbers))
