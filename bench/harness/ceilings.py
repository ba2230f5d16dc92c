"""What this machine reaches at most, found in the rounds of the contest it limits: bytes a second, and FLOPs a second.

Several calls do as much as they can of one thing, again and again in every round, and the best time of the best of them counts:
which library multiplies fastest differs between machines, and a median would be a rate that others exceed.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_engine.kernels.cpu import library
from vstar_engine.kernels.linear import linear
from vstar_engine.kernels.problems import LinearProblem

from .machine import cache_bytes
from .timing import Timing, interleave, seconds_of_burst

BANDWIDTH, MATRIX = "bandwidth ceiling", "matrix ceiling"
UNITS = {BANDWIDTH: "bytes", MATRIX: "flops"}
GEMM_SIDE = {"cpu": 1024, "cuda": 8192}
# images, channels and side of the convolution that oneDNN runs nearest to the peak: 268 GFLOP/s of one core, MKL's product
# 110 (AMD EPYC with AVX-512)
IMAGES = (8, 128, 16)
STREAM_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}


@dataclass(frozen=True)
class Ceiling:
    """Calls that do as much of one thing as this machine can, and how much each does (bytes or FLOPs)."""

    calls: Mapping[str, tuple[Callable[[], object], float]]


@dataclass(frozen=True)
class Reached:
    """The highest rate that a ceiling's calls reached: which of them, and its times."""

    per_second: float
    by: str
    timing: Timing


@lru_cache(maxsize=1)
def streams(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Makes a plain tensor four times the last cache at least; every page of it has been written to."""
    count = max(STREAM_BYTES[device.type], cache_bytes(device)) // dtype.itemsize
    part = torch.randn(2**20, device=device).to(dtype)
    return part.repeat(4 * -(-count // len(part)))


def bandwidth_ceiling(device: torch.device, dtype: torch.dtype, like: Sequence[Sequence[Tensor]] | None = None) -> Ceiling:
    """Returns memory's ceiling: three reads and a write at the strides of each triple of `like`, a copy, an update, a read."""
    x, y, z, out = streams(device, dtype).chunk(4)
    triples = [(x, y, z, out)] if like is None else [(*triple, torch.empty_like(triple[0]).fill_(0)) for triple in like]
    places = itertools.cycle(triples)

    def stream() -> Tensor:
        *given, into = next(places)
        return torch.addcmul(*given, out=into)

    half, rest = streams(device, dtype).chunk(2)
    one, two = float(x.nbytes), float(half.nbytes)
    return Ceiling(
        {
            "three reads and a write": (stream, 4.0 * triples[0][0].numel() * dtype.itemsize),
            "a copy": (partial(out.copy_, x), 2 * one),
            "an update in place": (partial(rest.clamp_, min=0.0), 2 * two),
            "a read": (half.sum, two),
        }
    )


def matrix_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """Returns the ceiling of large square products, plain and by a transposed matrix; on a CPU also a convolution and ours."""
    side = GEMM_SIDE[device.type]
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    work = 2.0 * side**3
    calls: dict[str, tuple[Callable[[], object], float]] = {
        "a product": (partial(torch.mm, a, b, out=out), work),
        "a product by a transposed matrix": (partial(F.linear, a, b), work),
    }
    if device.type == "cpu":
        images, channels, edge = IMAGES
        x, weight = (
            torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
            for shape in ((images, channels, edge, edge), (channels, channels, 3, 3))
        )
        calls["a convolution"] = (partial(torch.conv2d, x, weight, padding=1), 18.0 * channels**2 * images * edge**2)
    if device.type == "cpu" and dtype == torch.float32 and library.status()[0]:
        rows = a[: side // 2, : side // 2].contiguous()
        columns = b[: side // 2, : side // 2].contiguous()
        calls["our product"] = (torch.no_grad()(partial(linear, LinearProblem(rows, columns, None))), work / 8)
    return Ceiling(calls)


def ceilings(device: torch.device, dtype: torch.dtype, like: Sequence[Sequence[Tensor]] | None = None) -> dict[str, Ceiling]:
    """Returns both ceilings; `like` are triples of the contest's tensors."""
    return {BANDWIDTH: bandwidth_ceiling(device, dtype, like), MATRIX: matrix_ceiling(device, dtype)}


def trials(ceilings: Mapping[str, Ceiling]) -> dict[str, Callable[[], object]]:
    """Returns the calls of all ceilings, as a contest's rounds take them."""
    return {f"{name}: {by}": call for name, ceiling in ceilings.items() for by, (call, _) in ceiling.calls.items()}


def reached(ceilings: Mapping[str, Ceiling], timings: Mapping[str, Timing]) -> dict[str, Reached]:
    """Returns the highest rate of each ceiling's calls, by the shortest time of each."""
    return {name: max(_rates(name, ceiling, timings), key=lambda rate: rate.per_second) for name, ceiling in ceilings.items()}


def _rates(name: str, ceiling: Ceiling, timings: Mapping[str, Timing]) -> Iterable[Reached]:
    for by, (_, amount) in ceiling.calls.items():
        timing = timings[f"{name}: {by}"]
        yield Reached(amount / timing.least, by, timing)


def per_second(most: Mapping[str, float]) -> dict[str, float]:
    """Names rates as rows do."""
    return {f"{UNITS[name]}_per_second": amount for name, amount in most.items()}


def measured(device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Measures both ceilings by themselves; returns their rates."""
    both = ceilings(device, dtype)
    calls = trials(both)
    timings = interleave(calls, rounds, warmup=1, clocks=dict.fromkeys(calls, seconds_of_burst))
    return {name: found.per_second for name, found in reached(both, timings).items()}
