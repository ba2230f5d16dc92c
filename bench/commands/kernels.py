"""Every op the project fuses against the ways to compute it without: by level, frames, dtype, batch and memory layout."""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vstar_engine.bench.harness.ceilings import ceilings
from vstar_engine.bench.harness.contest import Contest, Pace, Provider, hold
from vstar_engine.bench.harness.machine import cache_bytes
from vstar_engine.bench.harness.rows import ResultFile
from vstar_engine.bench.harness.timing import seconds_of_short
from vstar_engine.bench.ops import op_providers, peak_memory, temporal_transformer
from vstar_engine.bench.ops.attention_providers import DENSE_PROVIDERS, LAYOUTS, PROVIDERS, Attention, Problem
from vstar_engine.bench.ops.op_cases import OpSite
from vstar_engine.bench.ops.temporal_transformer import transformer_contest
from vstar_engine.config.models import MODELS, Spec, model_named, parse_size
from vstar_engine.kernels.temporal_attention import temporal_attention_dense_ref
from vstar_engine.machine import malloc
from vstar_engine.machine.device import DTYPES, device_named, dtype_named
from vstar_engine.networks.unet import INIT_ATTENTION_HEADS

from .options import add_common, open_rows

SUITE = "kernels"
# relative L2 against float64; PyTorch's own attention shows 3e-7, 3e-4 and 3e-3, one without the regulariser 0.1
ERROR_BUDGET = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SIGMA = 1.0
# positions compared with float64, spread from the first to the last
COMPARED = 16
MAX_COPIES = 16
INIT = "init"


def attention_shape(spec: Spec, size: tuple[int, ...], level: int | str, frames: int, batch: int) -> tuple[int, ...]:
    """Returns the (B, T, P, heads, head_dim) of a level's temporal attention; `init` is the stem's."""
    unet, depth = spec.unet, 0 if level == INIT else int(level)
    if depth >= unet.levels:
        raise ValueError(f"model {spec.name} has levels 0 to {unet.levels - 1} and {INIT}, got {level}")
    height, width = (side // spec.vae.factor >> depth for side in size)
    channels = unet.model_channels * unet.channel_mult[depth]
    heads = INIT_ATTENTION_HEADS if level == INIT else channels // unet.head_dim
    return batch, frames, height * width, heads, unet.head_dim


def attention_contest(
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    case: dict[str, Any],
    chosen: list[str],
    compiler: str = "inductor",
) -> Contest:
    """Draws enough problems that together they outgrow the cache, and lets every provider walk through them."""
    batch, frames, positions, heads, _ = shape
    nbytes = 4.0 * math.prod(shape) * dtype.itemsize
    copies = min(MAX_COPIES, math.ceil(2 * cache_bytes(device) / nbytes))
    problems = [Problem.random(shape, dtype, device, case["layout"], SIGMA, compiler) for _ in range(copies)]
    table = PROVIDERS if op == "temporal_attention" else DENSE_PROVIDERS
    maps = 4.0 * batch * positions * heads * frames**2
    providers = [
        Provider(name, partial(walk, found, problems), needs=found.maps * maps, traced=found.traced)
        for name, found in table.items()
        if not chosen or name in chosen
    ]
    plain = {name for name, found in table.items() if found.plain}
    flops = 4.0 * math.prod(shape) * frames
    return Contest(
        SUITE,
        {"op": op, **case, "shape": "x".join(map(str, shape))},
        dtype,
        device,
        providers,
        partial(error, problems[0], plain),
        ERROR_BUDGET[dtype],
        nbytes,
        flops,
        ceilings(device, dtype, [(problem.q, problem.k, problem.v) for problem in problems]),
        seconds_of_short,
    )


def walk(attention: Attention, problems: list[Problem]) -> Callable[[], Tensor]:
    """Prepares every problem; the call it gives takes them in turn, the first one first."""
    calls = itertools.cycle([attention.prepare(problem) for problem in problems])
    return lambda: next(calls)()


def error(problem: Problem, plain: set[str], name: str, answer: Tensor) -> float:
    """Holds an answer to the first problem to float64, at positions from the first to the last."""
    if answer.shape != problem.q.shape:
        return math.inf
    positions = problem.q.shape[2]
    here = torch.linspace(0, positions - 1, min(COMPARED, positions), device=problem.bias.device).long()
    bias = torch.zeros_like(problem.bias) if name in plain else problem.bias
    parts = (x[:, :, here].double() for x in (problem.q, problem.k, problem.v))
    exact = temporal_attention_dense_ref(*parts, bias[None].double())
    return float((answer[:, :, here].double() - exact).norm() / exact.norm())


OPS = ("temporal_attention", "temporal_attention_dense", "temporal_transformer", *op_providers.OPS)


def known() -> list[str]:
    """Lists the providers of all ops."""
    return list(dict.fromkeys([*PROVIDERS, *temporal_transformer.NAMES, *op_providers.NAMES]))


def level(text: str) -> int | str:
    if text != INIT and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a level is a whole number from 0 up or {INIT}, got {text!r}")
    return text if text == INIT else int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what to measure; by default level 0 of VideoCrafter2."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    add_common(parser, rounds=9, limit=60.0)
    parser.add_argument("--op", choices=OPS, nargs="+", default=["temporal_attention"], help="default %(default)s")
    parser.add_argument("--model", choices=MODELS, default="videocrafter2", help="whose shapes (default %(default)s)")
    parser.add_argument("--size", type=parse_size, metavar="HEIGHTxWIDTH", help="pixels, default the model's own")
    parser.add_argument("--levels", type=level, nargs="+", default=[0], help="UNet levels, or init (default 0)")
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 32, 64, 96, 128, 256], help="default %(default)s")
    half = {"cuda": "float16", "cpu": "float32"}[there]
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=[half], help="default %(default)s")
    parser.add_argument("--batch", type=int, nargs="+", default=[{"cuda": 2, "cpu": 1}[there]], help="default %(default)s")
    parser.add_argument("--layout", choices=LAYOUTS, nargs="+", default=["fused"], help="what q, k, v lie in (default fused)")
    parser.add_argument("--providers", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(map(repr, known()))}")
    parser.add_argument("--compiler", default="inductor", help="back end of torch.compile (default %(default)s)")
    parser.add_argument("--device", default=there, help="default %(default)s")
    parser.add_argument(
        "--computed", action="store_true", help="only what temporal attention allocates at its peak, by shapes alone"
    )


def computed(args: argparse.Namespace, rows: ResultFile) -> None:
    """Writes the peaks of temporal attention by every provider that can be followed without data."""
    spec = model_named(args.model)
    names = [name for name, way in PROVIDERS.items() if way.traced and (not args.providers or name in args.providers)]
    axes = itertools.product(map(dtype_named, args.dtype), args.batch, args.levels, args.layout, args.frames, names)
    for dtype, batch, depth, layout, frames, name in axes:
        shape = attention_shape(spec, args.size or spec.size, depth, frames, batch)
        case = {"level": depth, "frames": frames, "batch": batch, "layout": layout}
        rows.write(peak_memory.row(name, shape, dtype, case, SIGMA))


def contests(args: argparse.Namespace, device: torch.device) -> Iterator[Contest]:
    """Draws one contest after another, since each holds its tensors; the first of every list is the most telling."""
    spec = model_named(args.model)
    size = args.size or spec.size
    spec.check_size(*size)
    axes = itertools.product(args.op, map(dtype_named, args.dtype), args.batch, args.levels, args.frames)
    for op, dtype, batch, depth, frames in axes:
        if op == "temporal_transformer":
            if depth != INIT:
                yield transformer_contest(spec, size, depth, frames, batch, dtype, device, args.providers)
            continue
        if op in op_providers.OPS:
            if depth != INIT:
                site = OpSite.at(spec, size, depth, frames, batch, dtype, device)
                yield from op_providers.contests(op, site, depth, args.providers, args.compiler)
            continue
        shape = attention_shape(spec, size, depth, frames, batch)
        for layout in args.layout:
            case = {"level": depth, "frames": frames, "batch": batch, "layout": layout}
            yield attention_contest(op, shape, dtype, device, case, args.providers, args.compiler)


def rehearse(args: argparse.Namespace) -> None:
    """Shrinks what the flags ask for to what takes seconds on a CPU."""
    args.model, args.size, args.levels, args.frames, args.batch = "mini", (32, 32), [0], [5], [2]
    args.device, args.dtype, args.rounds, args.op, args.layout = "cpu", ["float32"], 1, list(OPS), list(LAYOUTS)
    args.compiler = "eager"


def run(args: argparse.Namespace) -> int:
    """Measures what the flags say; 1 if a provider was wrong or failed."""
    if args.rehearse:
        rehearse(args)
    unknown = set(args.providers) - set(known())
    if unknown:
        raise ValueError(f"no provider {', '.join(sorted(unknown))}; there are {', '.join(known())}")
    if args.computed and args.op != ["temporal_attention"]:
        raise ValueError(f"--computed follows temporal_attention alone, got --op {' '.join(args.op)}")
    device = device_named(args.device, dtype_named(args.dtype[0]))
    if device.type == "cpu":
        malloc.keep_pages()  # as the engine does: else what is timed is the kernel that maps the answer's pages
    torch.manual_seed(0)
    pace = Pace.within(args.budget, rounds=args.rounds, limit=args.limit)
    with open_rows(args) as rows:
        if args.computed:
            computed(args, rows)
        else:
            measure(contests(args, device), rows, pace)
    return 1 if rows.failures else 0


def measure(asked: Iterator[Contest], rows: ResultFile, pace: Pace) -> None:
    """Holds contests one by one, compilers starting afresh in each: they give up on a function after eight shapes."""
    for contest in asked:
        torch.compiler.reset()
        hold(contest, rows, pace)
