"""A contest: one case, the providers that answer it, and what is right. Who is wrong is not timed."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vstar_engine.errors import MissingLibrary
from vstar_engine.memory import LiveBytes

from .machine import free_bytes
from .rows import ABSENT, FAILED, SKIPPED, WRONG, Row, Rows, sentence
from .timing import MIN_ROUNDS, Timing, interleave, seconds_of, summarise, synchronize

# what an allocation, a compiler or a kernel launch raises; anything else is this program's own fault and rises
FAILURES = (RuntimeError, OSError, MemoryError)
GEMM_SIDE = {"cpu": 1024, "cuda": 8192}
STREAM_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
BANDWIDTH, MATRIX = "bandwidth ceiling", "matrix ceiling"
# of the free memory, what one provider may plan to use
USABLE = 0.8


class NotHere(Exception):
    """A provider says nothing about this run: it would be another's, or the device has no such thing."""


@dataclass(frozen=True)
class Ceiling:
    """A call that does as much of one thing as this machine can, and how much that is (bytes or FLOPs)."""

    call: Callable[[], object]
    amount: float


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
    clock: Callable[[Callable[[], object]], list[float]] = seconds_of

    def row(self, provider: str, **found: Any) -> Row:
        return Row(self.suite, self.case, provider, str(self.dtype)[6:], str(self.device), **found)


@dataclass(frozen=True)
class Pace:
    """How long to measure: rounds at most, untimed rounds before, seconds a contest, and when nothing new may start."""

    rounds: int = 9
    warmup: int = 1
    limit: float = 60.0
    deadline: float = float("inf")

    @staticmethod
    def within(budget: float, **pace: Any) -> "Pace":
        """Gives a pace whose deadline is `budget` seconds from now."""
        return Pace(deadline=time.monotonic() + budget, **pace)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()


def bandwidth_ceiling(like: Sequence[Sequence[Tensor]]) -> Ceiling:
    """A kernel that reads three tensors and writes one, at the strides of the triples given, which it takes in turn.

    What it writes to is there already: no page of it is mapped while the clock runs.
    """
    places = itertools.cycle([(*triple, torch.zeros_like(triple[0])) for triple in like])

    def stream() -> Tensor:
        x, y, z, out = next(places)
        return torch.addcmul(x, y, z, out=out)

    return Ceiling(stream, 4.0 * like[0][0].numel() * like[0][0].element_size())


def matrix_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """A large square matrix product in the contest's dtype; on a CPU by the faster of PyTorch's two libraries."""
    side = GEMM_SIDE[device.type]
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    halves, weight = a.view(2, side // 2, 1, side).permute(0, 3, 1, 2), b.t().contiguous()[:, :, None, None]

    def multiply() -> Tensor:
        return torch.mm(a, b, out=out)

    def convolve() -> Tensor:
        return torch.conv2d(halves, weight)

    calls = {"product": multiply, "convolution": convolve} if device.type == "cpu" else {"product": multiply}
    timings = interleave(calls, MIN_ROUNDS, warmup=1)
    return Ceiling(calls[min(calls, key=lambda name: timings[name].median)], 2.0 * side**3)


def ceilings(device: torch.device, dtype: torch.dtype, like: Sequence[Sequence[Tensor]] | None = None) -> dict[str, Ceiling]:
    """Gives both ceilings; `like` are triples of the contest's tensors, else three plain ones larger than any cache."""
    if like is None:
        count = STREAM_BYTES[device.type] // dtype.itemsize
        like = [[torch.randn(count, device=device).to(dtype) for _ in range(3)]]
    return {BANDWIDTH: bandwidth_ceiling(like), MATRIX: matrix_ceiling(device, dtype)}


@torch.no_grad()
def hold(contest: Contest, rows: Rows, pace: Pace) -> dict[str, Timing]:
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
    with_ceilings = {**calls, **{name: ceiling.call for name, ceiling in contest.ceilings.items()}}
    timings = interleave(with_ceilings, pace.rounds, pace.warmup, limit, contest.clock)
    most = {name: ceiling.amount / timings[name].median for name, ceiling in contest.ceilings.items()}
    for name in calls:
        numbers = {**asdict(timings[name]), **shares(contest, timings[name].median, most), **facts[name]}
        rows.write(contest.row(name, numbers=numbers, ceilings=_per_second(most)))
    for name in contest.ceilings:
        rows.write(contest.row(name, numbers=asdict(timings[name]), ceilings=_per_second(most)))
    return timings


def check(contest: Contest, provider: Provider) -> tuple[Row, Callable[[], Any] | None]:
    """Prepares a provider and holds its answer to what is right; gives its call, or None and a row that says why not."""
    row = contest.row(provider.name)
    free = free_bytes(contest.device)
    if provider.needs > USABLE * free:
        words = f"needs about {provider.needs / 2**30:.1f} GiB of {free / 2**30:.1f} that are free"
        return replace(row, status=SKIPPED, note=words), None
    try:
        begun = time.monotonic()
        call = provider.prepare()
        answer = call()
        synchronize()
        first = time.monotonic() - begun
        error = contest.error(provider.name, answer)
        del answer
        if not error <= contest.budget:
            words = f"relative L2 error {error:.3g}, wanted at most {contest.budget:g}"
            return replace(row, status=WRONG, note=words), None
        peak = peak_bytes(call, contest.device) if provider.traced or contest.device.type == "cuda" else None
    except MissingLibrary as missing:
        return replace(row, status=ABSENT, note=str(missing)), None
    except NotHere as reason:
        return replace(row, status=SKIPPED, note=str(reason)), None
    except FAILURES as failure:
        return replace(row, status=FAILED, note=sentence(failure)), None
    return replace(row, numbers={"error": error, "first_call": first, "peak_bytes": peak, **provider.facts}), call


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Measures what a call allocates at most: on a CPU the tensors that operators make, without scratch inside them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        call()
    return live.peak


def shares(contest: Contest, seconds: float, most: Mapping[str, float]) -> dict[str, float | None]:
    """Gives what was reached per second, its shares of the ceilings, and the seconds that no answer can go below."""
    found: dict[str, float | None] = {}
    floors = []
    for name, amount, ceiling in (("bandwidth", contest.bytes, BANDWIDTH), ("matrix", contest.flops, MATRIX)):
        unit = "bytes" if name == "bandwidth" else "flops"
        if amount is not None and ceiling in most:
            floors.append(amount / most[ceiling])
            found |= {f"{unit}_per_second": amount / seconds, f"share_of_{name}": amount / seconds / most[ceiling]}
    return {**found, "floor": max(floors)} if floors else found


def _per_second(most: Mapping[str, float]) -> dict[str, float]:
    units = {BANDWIDTH: "bytes_per_second", MATRIX: "flops_per_second"}
    return {units[name]: amount for name, amount in most.items()}
