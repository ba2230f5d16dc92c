"""The one timer: warms up, interleaves the variants, reports median [p20, p80]."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant over all rounds."""

    median: float
    p20: float
    p80: float


def interleave(variants: dict[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, Timing]:
    """Runs every variant once a round, so that what else the machine does falls on all of them."""
    for _ in range(warmup):
        for run in variants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: _summary(values) for name, values in seconds.items()}


def _summary(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(*values * 3)
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), p20, p80)
