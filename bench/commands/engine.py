"""The engine around its networks: cold start, loading, the first step, building a package, size on disk and memory.

Every cold start is a process of its own; the files are in the system's cache after the first, which is not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vstar_engine.bench.harness.contest import FAILURES, Pace, hold
from vstar_engine.bench.harness.rows import ABSENT, FAILED, SKIPPED, ResultFile, ResultRow, sentence
from vstar_engine.bench.harness.timing import summarise
from vstar_engine.bench.step import compiled_step
from vstar_engine.config.models import MODELS, Spec, model_named
from vstar_engine.errors import CheckpointError, MissingLibrary
from vstar_engine.export.builders import BUILDERS
from vstar_engine.machine.device import DTYPES, device_named, dtype_named
from vstar_engine.weights import bundled

from .options import add_common, open_rows

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
    parser.add_argument(
        "--builds", choices=BUILDERS, nargs="*", default=[], help="build engines too, for these back ends, and set their steps"
    )
    parser.add_argument("--no-starts", action="store_true", help="leave out the cold starts")
    parser.add_argument("--engines", type=Path, nargs="+", metavar="DIR", help="set these built engines against eager instead")


def cold_start(args: argparse.Namespace) -> dict[str, Any]:
    """Starts the engine in a process of its own; RuntimeError with its last line where it fails."""
    weights = str(args.weights) if args.weights else None
    given = {"model": args.model, "weights": weights, "frames": args.frames, "device": args.device, "dtype": args.dtype}
    begun = time.perf_counter()
    command = [sys.executable, "-m", "vstar_engine.bench.step.cold_start", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True)
    taken = time.perf_counter() - begun
    if done.returncode:
        raise RuntimeError(said_last(done))
    return {"process": taken, **json.loads(done.stdout.splitlines()[-1])}


def said_last(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the last line that a process which failed wrote."""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def size_on_disk(spec: Spec, weights: Path | None) -> int:
    """Adds up the files of a folder of weights."""
    folder = weights or bundled.weights(spec)
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def run(args: argparse.Namespace) -> int:
    """Measures what the flags say; 1 if something failed."""
    pace = Pace.within(args.budget, rounds=args.rounds, limit=args.limit)
    if args.engines:
        with open_rows(args) as rows:
            hold(compiled_step.contest(args.engines, args.frames), rows, pace)
        return 1 if rows.failures else 0
    if args.rehearse:
        args.model, args.weights, args.frames, args.device, args.dtype = "mini", None, 2, "cpu", "float32"
        pace = replace(pace, rounds=1, warmup=0)
    spec, device = model_named(args.model), device_named(args.device, dtype_named(args.dtype))
    if args.weights is not None and not args.weights.is_dir():
        raise CheckpointError(f"no weights at {args.weights}; give a folder made by `vstar-engine convert`")
    disk = size_on_disk(spec, args.weights)
    case = {"part": "cold start", "model": args.model, "frames": args.frames}
    with open_rows(args) as rows:
        try:
            row = ResultRow("engine", case, "", args.dtype, str(device))
            if not args.no_starts:
                measure_starts(args, row, disk, rows, pace)
            measure_builds(args, row, rows, pace)
        except FAILURES as error:
            row = ResultRow("engine", case, "eager", args.dtype, str(device))
            rows.write(replace(row, status=FAILED, note=sentence(error)))
    return 1 if rows.failures else 0


def measure_starts(args: argparse.Namespace, row: ResultRow, disk: int, rows: ResultFile, pace: Pace) -> None:
    """Starts the engine while there is time; a row for each span of time, and one for what it holds."""
    if pace.left <= 0:
        rows.write(replace(row, provider="process", status=SKIPPED, note="0 s were left"))
        return
    begun = time.monotonic()
    starts = [cold_start(args) for _ in range(pace.warmup)]
    for done in range(pace.rounds):
        spent = time.monotonic() - begun
        # one is measured in any case
        if done and (spent + spent / len(starts) > pace.limit or pace.left < spent / len(starts)):
            break
        starts.append(cold_start(args))
    starts = starts[pace.warmup :]
    for name in SECONDS:
        timing = summarise([start[name] for start in starts])
        numbers = {"median": timing.median, "p20": timing.p20, "p80": timing.p80, "rounds": timing.rounds}
        rows.write(replace(row, provider=name.replace("_", " "), numbers=numbers))
    held = {
        "disk_bytes": disk,
        **{name: max(s[name] for s in starts) for name in ("host_bytes", "device_bytes") if starts[0][name]},
    }
    rows.write(replace(row, provider="bytes", numbers=held))


def built_here(args: argparse.Namespace, backend: str, folder: Path) -> dict[str, Any]:
    """Builds an engine in a process of its own, with no compiler's cache; RuntimeError with its last line where it fails."""
    given = ["--model", args.model, *(["--weights", str(args.weights)] if args.weights else [])]
    flags = ["--device", args.device, "--dtype", args.dtype, "--out", str(folder / backend), "--json"]
    caches = {name: str(folder / "cache") for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    command = [sys.executable, "-m", "vstar_engine", "build", "--backend", backend, *given, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **caches})
    if done.returncode == MissingLibrary.exit_code:
        raise MissingLibrary(said_last(done))
    if done.returncode:
        raise RuntimeError(said_last(done))
    return json.loads(done.stdout.splitlines()[-1])


def measure_builds(args: argparse.Namespace, row: ResultRow, rows: ResultFile, pace: Pace) -> None:
    """Builds an engine for each back end once and writes what that took; then sets their steps against eager's."""
    folders = []
    with tempfile.TemporaryDirectory() as scratch:
        for backend in args.builds:
            row = replace(row, case={**row.case, "part": "build"}, provider=backend)
            if pace.left <= 0:
                rows.write(replace(row, status=SKIPPED, note="0 s were left"))
                continue
            try:
                manifest = built_here(args, backend, Path(scratch))
            except MissingLibrary as missing:
                rows.write(replace(row, status=ABSENT, note=str(missing)))
                continue
            taken = dict.fromkeys(("median", "p20", "p80"), manifest["seconds"])
            sizes = {"disk_bytes": sum(file["bytes"] for file in manifest["files"]), "host_bytes": manifest["peak_memory"]}
            rows.write(replace(row, numbers={**taken, "rounds": 1, **sizes}))
            folders.append(Path(manifest["folder"]))
        if folders:
            hold(compiled_step.contest(folders, args.frames), rows, pace)
