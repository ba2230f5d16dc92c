"""The fastest of several ways to compute the same, tried out once for each case on the device it runs on and then kept.

As cuDNN's benchmark mode chooses among its algorithms. What is recorded as a CUDA graph cannot be timed: there the way that was
kept runs, or the first one where none was. Rounding differs among ways, so what was chosen is stored for the processes to come
(`choices`); where PyTorch is told to be deterministic, and none may depend on time, the first one runs.
"""

import logging
from collections.abc import Callable, Hashable, Mapping
from functools import cache
from typing import TypeVar

import torch

from .autotune_cache import Choices

log = logging.getLogger(__name__)

# calls that load and compile what they run, and calls that are timed, of which the fastest counts
WARM, ROUNDS = 2, 5
T = TypeVar("T")
Ways = Mapping[str, Callable[[], T]]

kept: dict[Hashable, str] = {}
stored = cache(Choices)


def gpu_seconds(call: Callable[[], object]) -> float:
    """Returns the time that a call takes the current GPU's stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def capturing() -> bool:
    """Returns whether operators are being recorded instead of run."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def timed(ways: Ways[T], seconds: Callable[[Callable[[], object]], float]) -> dict[str, float]:
    """Times the ways in turn and gives the least seconds of each."""
    for call in ways.values():
        for _ in range(WARM):
            call()
    rounds = [{name: seconds(call) for name, call in ways.items()} for _ in range(ROUNDS)]
    return {name: min(times[name] for times in rounds) for name in ways}


def chosen(case: Hashable, ways: Ways[T], seconds: Callable[[Callable[[], object]], float]) -> str:
    """Times the ways and stores which is the fastest."""
    times = timed(ways, seconds)
    log.info("%s: %s", case, ", ".join(f"{name} {1e6 * took:.0f} us" for name, took in times.items()))
    return stored().add(str(case), min(times, key=times.__getitem__), ways)


def fastest(case: Hashable, ways: Ways[T], seconds: Callable[[Callable[[], object]], float] = gpu_seconds) -> T:
    """Computes by the way that is the fastest in a case; a lone way is never timed."""
    default = next(iter(ways))
    if len(ways) == 1 or torch.are_deterministic_algorithms_enabled():
        return ways[default]()
    if case not in kept and not capturing():
        before = stored().chosen.get(str(case), "")
        kept[case] = before if before in ways else chosen(case, ways, seconds)
    return ways[kept.get(case, default)]()
