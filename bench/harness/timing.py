"""The one timer: interleaved rounds on the device's own clock, reduced to a median and the fifths around it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch

Mark = float | torch.cuda.Event
Clock = Callable[[Callable[[], object]], list[float]]

MIN_ROUNDS = 3
# seconds of a call that another's caches and clock do not change
LONG = 0.05
# how long one visit repeats a short call; Triton's timer also warms up for as long and empties the cache before every call
VISIT_MILLISECONDS = 5


@dataclass(frozen=True)
class Timing:
    """Seconds one call took: the middle of the rounds, the fifths around it, and the least."""

    median: float
    p20: float
    p80: float
    rounds: int
    least: float


@cache
def host_clock() -> Callable[[], float]:
    """Returns PyTorch's benchmark clock. Imports it when first needed, since it imports PyTorch's compilers."""
    from torch.utils.benchmark import timer

    return timer


def mark() -> Mark:
    """Notes a moment on the GPU's clock in stream order, or on the host's where there is no GPU."""
    if not torch.cuda.is_available():
        return host_clock()()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Waits for `end` and returns the seconds since `start`."""
    if isinstance(start, float) or isinstance(end, float):
        return float(end) - float(start)  # type: ignore[arg-type]
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def synchronize() -> None:
    """Waits until the GPU, where there is one, has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object]) -> list[float]:
    """Times one call."""
    synchronize()
    start = mark()
    call()
    return [seconds_between(start, mark())]


def seconds_of_second(call: Callable[[], object]) -> list[float]:
    """Times one call behind an untimed one of the same kind, which leaves memory and caches as that kind leaves them."""
    call()
    return seconds_of(call)


def seconds_of_short(call: Callable[[], object]) -> list[float]:
    """Times a call that may be shorter than its launch: on a GPU by Triton's timer, which fills the stream before each.

    On a CPU an untimed call of the same kind goes before, unless calls are LONG.
    """
    if not torch.cuda.is_available():
        taken = seconds_of(call)
        return taken if sum(taken) > LONG else seconds_of(call)
    from triton.testing import do_bench

    milliseconds = do_bench(call, warmup=VISIT_MILLISECONDS, rep=VISIT_MILLISECONDS, return_mode="all")
    return [taken / 1e3 for taken in milliseconds]


def seconds_of_burst(call: Callable[[], object]) -> list[float]:
    """Times a call again and again for a visit's length, for who seeks the least it takes."""
    if torch.cuda.is_available():
        return seconds_of_short(call)
    taken = seconds_of(call)
    while sum(taken) < VISIT_MILLISECONDS / 1e3:
        taken += seconds_of(call)
    return taken


def interleave(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    limit: float = float("inf"),
    clock: Clock = seconds_of,
    clocks: Mapping[str, Clock] = MappingProxyType({}),
) -> dict[str, Timing]:
    """Times the variants in turn, round by round, so that a drift of the machine's clock meets all of them alike.

    The caller has checked that their results are right. `warmup` untimed rounds, in the same order, come first. After
    MIN_ROUNDS no round starts that would end later than `limit` seconds after the first timed one. `clocks` are variants'
    own, where they have any.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup at least 0, got {rounds} and {warmup}")
    for _ in range(warmup):
        for call in variants.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    synchronize()
    now = host_clock()
    begun = now()
    for done in range(rounds):
        if done >= MIN_ROUNDS and (now() - begun) * (done + 1) / done > limit:
            break
        for name, call in variants.items():
            seconds[name] += clocks.get(name, clock)(call)
    return {name: summarise(taken) for name, taken in seconds.items()}


def summarise(seconds: list[float]) -> Timing:
    """Reduces rounds to their median, 20th and 80th percentiles, and the shortest."""
    quantiles = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    median, p20, p80 = quantiles.tolist()
    return Timing(median, p20, p80, len(seconds), min(seconds))
