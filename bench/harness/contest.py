"""A contest: one case, the providers that answer it, and what is right. Who is wrong is not timed."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from vstar_engine.backends.cuda_graphs import Recording
from vstar_engine.errors import MissingLibrary
from vstar_engine.machine.memory import LiveBytes

from .ceilings import BANDWIDTH, MATRIX, UNITS, Ceiling, per_second, reached, trials
from .machine import free_bytes
from .rows import ABSENT, FAILED, SKIPPED, WRONG, ResultFile, ResultRow, sentence
from .timing import Clock, Timing, interleave, seconds_of, seconds_of_burst, summarise, synchronize

# what an allocation, a compiler or a kernel launch raises; anything else is this program's own fault and rises
FAILURES = (RuntimeError, OSError, MemoryError)
# of the free memory, what one provider may plan to use
USABLE = 0.8


class NotHere(Exception):
    """A provider says nothing about this run: it would be another's, or the device has no such thing."""


@dataclass(frozen=True)
class Provider:
    """One way to answer: `prepare` compiles and allocates, and gives the call to time.

    `needs` are the bytes it will take at its peak, as far as known. Where `traced`, its allocations can be followed on a CPU.
    `facts` join its numbers.
    """

    name: str
    prepare: Callable[[], Callable[[], Any]]
    needs: float = 0.0
    traced: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contest:
    """What is asked, of whom, and how right an answer must be.

    `error(provider's name, answer)` is the relative L2 error against a wider dtype, `budget` the most it may be. `bytes` and
    `flops` are the least that any answer must move and do; None where that is not known.
    """

    suite: str
    case: Mapping[str, Any]
    dtype: torch.dtype
    device: torch.device
    providers: Sequence[Provider]
    error: Callable[[str, Any], float]
    budget: float
    bytes: float | None = None
    flops: float | None = None
    ceilings: Mapping[str, Ceiling] = field(default_factory=dict)
    clock: Clock = seconds_of

    def row(self, provider: str, **found: Any) -> ResultRow:
        return ResultRow(self.suite, self.case, provider, str(self.dtype)[6:], str(self.device), **found)


@dataclass(frozen=True)
class Pace:
    """How long to measure: rounds at most, untimed rounds before, seconds a contest, and when nothing new may start."""

    rounds: int = 9
    warmup: int = 1
    limit: float = 60.0
    deadline: float = float("inf")

    @staticmethod
    def within(budget: float, **pace: Any) -> "Pace":
        """Returns a pace whose deadline is `budget` seconds from now."""
        return Pace(deadline=time.monotonic() + budget, **pace)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()


@torch.no_grad()
def hold(contest: Contest, rows: ResultFile, pace: Pace) -> dict[str, Timing]:
    """Checks every provider, times those that are right against each other and the ceilings, and writes a row for each.

    Who is right has a row at once, timed alone, for the case that the run is cut off; that of the rounds in turn replaces it.
    """
    calls: dict[str, Callable[[], object]] = {}
    facts: dict[str, dict[str, Any]] = {}
    slowest = 0.0
    for provider in contest.providers:
        if pace.left < slowest:
            rows.write(contest.row(provider.name, status=SKIPPED, note=f"{max(pace.left, 0.0):.0f} s were left"))
            continue
        begun = time.monotonic()
        try:
            row, call = check(contest, provider)
        except (KeyboardInterrupt, SystemExit):
            words = f"stopped after {time.monotonic() - begun:.0f} s of preparing it"
            rows.write(contest.row(provider.name, status=SKIPPED, note=words))
            raise
        if call is not None:
            calls[provider.name], facts[provider.name] = call, dict(row.numbers)
            row = replace(row, numbers={**asdict(summarise(contest.clock(call))), **row.numbers, "alone": True})
        rows.write(row)
        slowest = max(slowest, time.monotonic() - begun)
    if not calls:
        return {}
    limit = min(pace.limit, max(pace.left, 0.0))
    highest = trials(contest.ceilings)
    clocks = dict.fromkeys(highest, seconds_of_burst)
    timings = interleave({**calls, **highest}, pace.rounds, pace.warmup, limit, contest.clock, clocks)
    best = reached(contest.ceilings, timings)
    most = {name: found.per_second for name, found in best.items()}
    for name in calls:
        numbers = {**asdict(timings[name]), **shares(contest, timings[name].median, most), **facts[name]}
        rows.write(contest.row(name, numbers=numbers, ceilings=per_second(most)))
    for name, found in best.items():
        rate = {f"{UNITS[name]}_per_second": found.per_second, "by": found.by}
        rows.write(contest.row(name, numbers={**asdict(found.timing), **rate}, ceilings=per_second(most)))
    return timings


def check(contest: Contest, provider: Provider) -> tuple[ResultRow, Callable[[], Any] | None]:
    """Prepares a provider and holds its answer to what is right; returns its call, or None and a row that says why not."""
    row = contest.row(provider.name)
    free = free_bytes(contest.device)
    if provider.needs > USABLE * free:
        words = f"needs about {provider.needs / 2**30:.1f} GiB of {free / 2**30:.1f} that are free"
        return replace(row, status=SKIPPED, note=words), None
    try:
        begun = time.monotonic()
        call = provider.prepare()
        # a recording computes in memory that it takes once, in this call; a replay takes none
        answer, peak = observed(call, contest.device) if isinstance(call, Recording) else (call(), None)
        synchronize()
        first = time.monotonic() - begun
        error = contest.error(provider.name, answer)
        del answer
        if not error <= contest.budget:
            words = f"relative L2 error {error:.3g}, wanted at most {contest.budget:g}"
            return replace(row, status=WRONG, note=words), None
        if peak is None and (provider.traced or contest.device.type == "cuda"):
            _, peak = observed(call, contest.device)
    except MissingLibrary as missing:
        return replace(row, status=ABSENT, note=str(missing)), None
    except NotHere as reason:
        return replace(row, status=SKIPPED, note=str(reason)), None
    except FAILURES as failure:
        return replace(row, status=FAILED, note=sentence(failure)), None
    return replace(row, numbers={"error": error, "first_call": first, "peak_bytes": peak, **provider.facts}), call


def observed(call: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """Returns a call's answer and its peak allocation: on a CPU the operators' tensors, without their scratch."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        answer = call()
        torch.cuda.synchronize()
        return answer, torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        answer = call()
    return answer, live.peak


def shares(contest: Contest, seconds: float, most: Mapping[str, float]) -> dict[str, float | None]:
    """Returns what was reached per second, its shares of the ceilings, and what bytes and FLOPs take at these: the floor."""
    found: dict[str, float | None] = {}
    floors = []
    for name, amount, ceiling in (("bandwidth", contest.bytes, BANDWIDTH), ("matrix", contest.flops, MATRIX)):
        if amount is not None and ceiling in most:
            floors.append(amount / most[ceiling])
            found |= {f"{UNITS[ceiling]}_per_second": amount / seconds, f"share_of_{name}": amount / seconds / most[ceiling]}
    return {**found, "floor": max(floors)} if floors else found
