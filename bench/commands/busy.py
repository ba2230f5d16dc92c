"""Times a video beside busy processes, for each way in which idle threads can wait.

Each way has a process of its own, since OpenMP reads it once. They denoise the video in turn, alone and beside processes that
count without end. With t threads of ours and s busy processes on c cores the fair time is the quiet one times
max(1, (s + t) / c). A row passes up to ALLOWED times that.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from vstar_engine.bench.harness.contest import Pace
from vstar_engine.bench.harness.rows import FAILED, SKIPPED, ResultFile, ResultRow, sentence
from vstar_engine.bench.harness.timing import MIN_ROUNDS, summarise
from vstar_engine.config.models import model_named
from vstar_engine.machine import threads

from .options import add_common, open_rows

SUITE = "busy"
ALLOWED = 1.3
PASSIVE, DEFAULT = "waits passively", "waits by OpenMP's default"
OURS, LONGER = f"spins {threads.SPIN_COUNT} times, then sleeps", "spins 1000 times, then sleeps"
WAYS = {
    PASSIVE: {threads.POLICY: threads.PASSIVE},
    OURS: {threads.POLICY: threads.PASSIVE, threads.SPINS: threads.SPIN_COUNT},
    LONGER: {threads.SPINS: "1000"},
    DEFAULT: {},
}
SPIN = "while True: pass"
# seconds in which neighbours start
SETTLE = 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the video, the neighbours and the ways to wait."""
    add_common(parser, rounds=5, limit=600.0)
    parser.add_argument("--frames", type=int, default=16, help="default %(default)s")
    parser.add_argument("--steps", type=int, default=12, help="default %(default)s")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[1, 2], help="busy processes (default 1 2)")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS), help="default all")


class Denoiser:
    """A process that denoises the mini model's video whenever it is asked, and says how many seconds that took."""

    def __init__(self, way: str, frames: int, steps: int):
        kept = {name: value for name, value in os.environ.items() if name not in threads.WAITING}
        command = [sys.executable, "-m", "vstar_engine.bench.step.busy_video", str(frames), str(steps)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**kept, **WAYS[way]}
        )

    def __enter__(self) -> "Denoiser":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def seconds(self) -> float:
        """Denoises once; RuntimeError where the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(file=self.process.stdin, flush=True)
        except BrokenPipeError as error:
            raise RuntimeError(f"the process that denoises ended with {self.process.wait()}") from error
        if not (said := self.process.stdout.readline()):
            raise RuntimeError(f"the process that denoises ended with {self.process.wait()}")
        return json.loads(said)


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Keeps so many processes busy."""
    started = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        if started:
            time.sleep(SETTLE)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def fair(quiet: float, ours: int, busy: int, cores: int) -> float:
    """Returns the seconds of a video where `cores` are shared evenly by our threads and the busy processes."""
    return quiet * max(1.0, (busy + ours) / cores)


def judged(row: ResultRow, seconds: Sequence[float], quiet: float, ours: int, cores: int) -> ResultRow:
    """Returns a row with its times; one of ours that took more than is allowed has failed."""
    timing = summarise(list(seconds))
    busy = row.case["neighbours"]
    wanted = ALLOWED * fair(quiet, ours, busy, cores)
    numbers = {**asdict(timing), "quiet": quiet, "times_quiet": timing.median / quiet, "allowed": wanted / quiet}
    row = replace(row, numbers=numbers)
    if not busy or row.provider != OURS or timing.median <= wanted:
        return row
    said = f"{timing.median / quiet:.2f} x its quiet time, {wanted / quiet:.2f} x is allowed"
    return replace(row, status=FAILED, note=said)


def times(denoisers: dict[str, Denoiser], counts: Sequence[int], pace: Pace) -> dict[tuple[str, int], list[float]]:
    """Times every way beside each number of neighbours in turn, round by round, as far as the limit goes."""
    found: dict[tuple[str, int], list[float]] = {(way, count): [] for way in denoisers for count in counts}
    for denoiser in denoisers.values():
        denoiser.seconds()  # the first loads and warms up
    begun = time.monotonic()
    for done in range(pace.rounds):
        spent = time.monotonic() - begun
        if done and (spent * (done + 1) / done > (pace.limit if done >= MIN_ROUNDS else pace.left)):
            break
        for count in counts:
            for way, denoiser in denoisers.items():
                with neighbours(count):
                    found[way, count].append(denoiser.seconds())
    return found


def run(args: argparse.Namespace) -> int:
    """Measures what the flags say; 1 if something failed."""
    if args.rehearse:
        args.frames, args.steps, args.rounds = 4, 1, 1
    if min(args.neighbours) < 1:
        raise ValueError(f"there must be at least 1 neighbour, got {min(args.neighbours)}")
    pace = Pace.within(args.budget, rounds=args.rounds, limit=args.limit)
    height, width = model_named("mini").size
    case = {"model": "mini", "frames": args.frames, "steps": args.steps, "size": f"{width}x{height}"}
    row = ResultRow(SUITE, case, "", "float32", "cpu")
    with open_rows(args) as rows:
        try:
            measure(args, row, rows, pace)
        except (RuntimeError, OSError) as error:
            rows.write(replace(row, provider=", ".join(args.ways), status=FAILED, note=sentence(error)))
    return 1 if rows.failures else 0


def measure(args: argparse.Namespace, row: ResultRow, rows: ResultFile, pace: Pace) -> None:
    """Writes a row for every way and number of neighbours."""
    if pace.left <= 0:
        rows.write(replace(row, provider=", ".join(args.ways), status=SKIPPED, note="no time was left"))
        return
    counts, ours, cores = (0, *sorted(set(args.neighbours))), torch.get_num_threads(), threads.cores().usable
    with ExitStack() as stack:
        denoisers = {way: stack.enter_context(Denoiser(way, args.frames, args.steps)) for way in args.ways}
        found = times(denoisers, counts, pace)
    for way in args.ways:
        quiet = summarise(found[way, 0]).median
        for count in counts:
            about: dict[str, Any] = {**row.case, "neighbours": count}
            rows.write(judged(replace(row, case=about, provider=way), found[way, count], quiet, ours, cores))
