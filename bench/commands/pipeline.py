"""A video's making, part by part: stages, the engine against clean baselines, the ladder from the published behaviour, how far
the run's dtype strays, what `--fast` saves and costs, and whole videos. Networks are seeded on the device where speed needs no
trained weights.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from vstar_engine.bench.harness.contest import FAILURES, NotHere, Pace, hold
from vstar_engine.bench.harness.rows import FAILED, SKIPPED, ResultFile, ResultRow, sentence
from vstar_engine.bench.harness.timing import seconds_of
from vstar_engine.bench.step import fast_modes, precision_drift, profile, stages, whole_videos
from vstar_engine.bench.step.ladder import COMPILED, ENGINE, GRAPH, IMPROVEMENTS, Step
from vstar_engine.bench.step.ladder import HEADLINE as CONTESTANTS
from vstar_engine.bench.step.workload import MODES, TINY, Workload, spec_named
from vstar_engine.config.models import MODELS, parse_size
from vstar_engine.config.sampling import Sampling
from vstar_engine.machine.device import DTYPES, device_named, dtype_named

from .options import add_common, open_rows

HEADLINE, STAGES, LADDER, ABLATION, TRAJECTORY, FAST, VIDEOS = PARTS = (
    "headline",
    "stages",
    "ladder",
    "ablation",
    "trajectory",
    "fast",
    "videos",
)
# those that make whole videos: minutes
LONG = (FAST, VIDEOS)
# what PyTorch's profiler takes, in steps
RECORDED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what to measure and on what."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    add_common(parser, rounds=5, limit=60.0)
    usual = [part for part in PARTS if part not in LONG]
    parser.add_argument(
        "--parts", choices=PARTS, nargs="+", default=usual, help=f"in this order; default all but {' and '.join(LONG)}"
    )
    parser.add_argument("--model", choices=[*MODELS, TINY.name], default="mini", help="default %(default)s")
    parser.add_argument("--full", action="store_const", dest="model", const="videocrafter2", help="the full model")
    parser.add_argument("--size", type=parse_size, metavar="HEIGHTxWIDTH", help="pixels, default the model's own")
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 32, 64, 128], help="default %(default)s")
    parser.add_argument("--steps", type=int, default=Sampling.steps, help="of a whole video (default %(default)s)")
    half = {"cuda": "float16", "cpu": "float32"}[there]
    parser.add_argument("--dtype", choices=DTYPES, default=half, help="default %(default)s")
    parser.add_argument("--device", default=there, help="default %(default)s")
    parser.add_argument("--compiler", default="inductor", help="back end of torch.compile (default %(default)s)")
    parser.add_argument(
        "--without", nargs="+", default=[], choices=IMPROVEMENTS, metavar="RUNG", help=f"of {', '.join(IMPROVEMENTS)}"
    )
    parser.add_argument("--providers", choices=CONTESTANTS, nargs="+", default=list(CONTESTANTS), help="of the headline")
    parser.add_argument(
        "--compile-mode", choices=MODES, default="max-autotune-no-cudagraphs", help="of torch.compile (default %(default)s)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out what takes a compiler or builds an engine")
    parser.add_argument("--no-graph", action="store_true", help="leave out CUDA graphs")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="also write profile.md and a Chrome trace there")


def rehearse(args: argparse.Namespace) -> None:
    """Shrinks what the flags ask for to what takes seconds on a CPU."""
    args.model, args.size, args.frames, args.steps = TINY.name, None, [3], 2
    args.device, args.dtype, args.rounds, args.compiler = "cpu", "float32", 1, "eager"


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Measures what the flags say; 1 if a provider was wrong or failed."""
    if args.rehearse:
        rehearse(args)
    spec, dtype = spec_named(args.model), dtype_named(args.dtype)
    size = args.size or spec.size
    spec.check_size(*size)
    device = device_named(args.device, dtype)
    torch.manual_seed(0)
    pace = Pace.within(args.budget, rounds=args.rounds, limit=args.limit)
    with open_rows(args) as rows:
        for frames in args.frames:
            measure(Workload(args.model, frames, size, dtype, device, args.compiler, args.compile_mode), args, rows, pace)
    return 1 if rows.failures else 0


def measure(workload: Workload, args: argparse.Namespace, rows: ResultFile, pace: Pace) -> None:
    """Measures the parts of one workload; what cannot even be set up becomes a row, and the other parts go on."""
    torch.compiler.reset()
    step = Step(workload)
    without = {*args.without, *(COMPILED if args.no_compile else ()), *([GRAPH] if args.no_graph else ())}
    parts: dict[str, Callable[[], object]] = {
        HEADLINE: lambda: hold(step.headline(without, args.providers), rows, pace),
        STAGES: lambda: stages.measure(workload, step, args.steps, rows, pace),
        LADDER: lambda: hold(step.ladder(without), rows, pace),
        ABLATION: lambda: hold(step.ablation(without), rows, pace),
        TRAJECTORY: lambda: precision_drift.measure(workload, args.steps, rows, pace),
        FAST: lambda: fast_modes.measure(workload, args.steps, rows, pace),
        VIDEOS: lambda: whole_videos.measure(workload, args.steps, rows, pace),
    }
    chosen = {name: part for name, part in parts.items() if name in args.parts}
    if args.profile:
        chosen["profile"] = lambda: profiled(workload, step, args.profile, rows, pace)
    for name, part in chosen.items():
        row = ResultRow("pipeline", {"part": name, **workload.case}, "all", str(workload.dtype)[6:], str(workload.device))
        if pace.left <= 0:
            rows.write(replace(row, status=SKIPPED, note="0 s were left"))
            continue
        try:
            part()
        except NotHere as reason:
            rows.write(replace(row, status=SKIPPED, note=str(reason)))
        except FAILURES as error:
            rows.write(replace(row, status=FAILED, note=sentence(error)))


def profiled(workload: Workload, step: Step, folder: Path, rows: ResultFile, pace: Pace) -> None:
    """Profiles one step with as many rounds as fit into what is left: NotHere where none does."""
    call = step.call(ENGINE)
    call()
    (taken,) = seconds_of(call)
    rounds = min(pace.rounds, int(pace.left / taken - RECORDED))
    if rounds < 1:
        raise NotHere(f"a profile takes about {(RECORDED + 1) * taken:.0f} s, and {pace.left:.0f} s were left")
    profile.measure(workload, step, rounds, folder, rows)
