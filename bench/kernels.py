"""Temporal attention against the published path, PyTorch's own attention and the memory floor, on a GPU or on this CPU.

Every variant starts from the fused projection's q, k, v (B, T, P, heads, head_dim), ends in that layout, and is held to float64
at a few positions before it is timed. The floor is one pass that reads three such tensors and writes one.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vstar_engine.device import DTYPES, device_named, dtype_named
from vstar_engine.kernels import native
from vstar_engine.kernels.temporal_attention import temporal_attention, temporal_attention_ref, toeplitz_bias
from vstar_engine.tar import toeplitz

from .rows import Rows, sentence
from .timing import Timing, interleave

# relative L2 against float64; PyTorch's own attention shows 3e-7, 3e-4 and 3e-3
ERROR_BUDGET = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
OURS, OURS_PLAIN, PUBLISHED, PLAIN_SDPA = "ours", "ours, g = 0", "published path", "SDPA, no regulariser"
FLOOR, GEMM = "memory floor", "matrix product"
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}


def split_heads(x: Tensor) -> Tensor:
    """(B, T, P, H, D) -> (B * P * H, T, D), copied, as attention over a batch of sequences wants it."""
    return x.permute(0, 2, 3, 1, 4).flatten(0, 2).contiguous()


def merge_heads(x: Tensor, like: Tensor) -> Tensor:
    batch, frames, positions, heads, width = like.shape
    return x.view(batch, positions, heads, frames, width).permute(0, 3, 1, 2, 4).contiguous()


def published(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The published model's passes: copies, scale, an unused softmax, row max, bias, sum, softmax, the stored head mean."""
    heads, frames = q.shape[3], q.shape[1]
    split_q, split_k, split_v = split_heads(q), split_heads(k), split_heads(v)
    phi = torch.einsum("bid,bjd->bij", split_q, split_k) * q.shape[-1] ** -0.5
    phi.softmax(dim=-1)
    delta = phi.amax(dim=-1, keepdim=True) * toeplitz_bias(g, frames, frames).to(phi)
    probs = (phi + delta).softmax(dim=-1)
    probs.view(-1, heads, frames, frames).mean(dim=1)
    return merge_heads(torch.einsum("bij,bjd->bid", probs, split_v), q)


def sdpa_two_pass(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Row max first, then PyTorch's attention with the bias as its additive mask."""
    split_q, split_k, split_v = split_heads(q), split_heads(k), split_heads(v)
    row_max = (split_q @ split_k.mT).amax(dim=-1, keepdim=True) * q.shape[-1] ** -0.5
    mask = (row_max * toeplitz_bias(g, q.shape[1], q.shape[1])).to(q.dtype)
    return merge_heads(scaled_dot_product_attention(split_q[:, None], split_k[:, None], split_v[:, None], mask[:, None]), q)


def sdpa_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    split_q, split_k, split_v = (split_heads(x)[:, None] for x in (q, k, v))
    return merge_heads(scaled_dot_product_attention(split_q, split_k, split_v), q)


def variants(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> dict[str, Callable[[], Tensor]]:
    zero = torch.zeros_like(g)
    return {
        OURS: partial(temporal_attention, q, k, v, g),
        OURS_PLAIN: partial(temporal_attention, q, k, v, zero),
        PUBLISHED: partial(published, q, k, v, g),
        "clean eager": partial(temporal_attention_ref, q, k, v, g),
        "SDPA, two passes": partial(sdpa_two_pass, q, k, v, g),
        PLAIN_SDPA: partial(sdpa_plain, q, k, v),
    }


def relative_error(name: str, run: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> float:
    """Compares a variant's first positions with float64."""
    here = slice(0, 3)
    bias = torch.zeros_like(g) if name in (OURS_PLAIN, PLAIN_SDPA) else g
    exact = temporal_attention_ref(q[:, :, here].double(), k[:, :, here].double(), v[:, :, here].double(), bias)
    return float((run()[:, :, here].double() - exact).norm() / exact.norm())


def matrix_product(like: Tensor) -> tuple[Callable[[], Tensor], float]:
    """Gives a large matrix product and its FLOPs: the machine's multiply-add ceiling as this run finds it."""
    side = GEMM_SIZE[like.device.type]
    a, b, out = (torch.randn(side, side, device=like.device).to(like.dtype) for _ in range(3))
    return partial(torch.mm, a, b, out=out), 2.0 * side**3


def time_shape(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Times every variant at q's shape (B, T, P, heads, head_dim); a variant off by more than its budget has only its error."""
    batch, frames, positions, heads, head_dim = shape
    fused = torch.randn(batch, frames, positions, 3, heads, head_dim, device=device).to(dtype)
    q, k, v = fused.unbind(3)
    g = toeplitz(frames, 1.0)[None].to(device)
    runs = variants(q, k, v, g)
    errors = {name: relative_error(name, run, q, k, v, g) for name, run in runs.items()}
    right = {name: run for name, run in runs.items() if errors[name] <= ERROR_BUDGET[dtype]}
    gemm, gemm_flops = matrix_product(q)
    timed: dict[str, Callable[[], object]] = {**right, FLOOR: partial(torch.addcmul, q, k, v), GEMM: gemm}
    # a run of the same kind goes before each: what the kernel must map again depends on what the run before gave back to it
    pairs = {settling + name: run for name, run in timed.items() for settling in ("settling ", "")}
    timings = {name: timing for name, timing in interleave(pairs, rounds, warmup=1).items() if "settling" not in name}
    peak = gemm_flops / timings.pop(GEMM).median
    flops = 4.0 * batch * frames**2 * head_dim * positions * heads
    table = {name: numbers(timing, timings, flops / peak) for name, timing in timings.items()}
    return {**table, **{name: {"error": error} for name, error in errors.items() if name not in right}}


def numbers(timing: Timing, timings: dict[str, Timing], seconds_at_peak: float) -> dict[str, float]:
    """Reduces a timing to milliseconds, its ratio to ours and its shares of the two ceilings."""
    milliseconds = {"ms": timing.median * 1e3, "p20": timing.p20 * 1e3, "p80": timing.p80 * 1e3}
    ratio = {"times ours": timing.median / timings[OURS].median} if OURS in timings else {}
    shares = {"of memory floor": timings[FLOOR].median / timing.median, "of matrix peak": seconds_at_peak / timing.median}
    return {**milliseconds, **ratio, **shares}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the shapes and the conditions; by default level 0 of VideoCrafter2."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append a row per variant to this file")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, two rounds")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="start no further shape after this")
    parser.add_argument("--device", default=there, help="default %(default)s")
    parser.add_argument(
        "--dtype", choices=DTYPES, default={"cuda": "float16", "cpu": "float32"}[there], help="default %(default)s"
    )
    parser.add_argument("--batch", type=int, default={"cuda": 2, "cpu": 1}[there], help="default %(default)s")
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 32, 64, 128], help="default %(default)s")
    parser.add_argument("--positions", type=int, default=2560, help="default %(default)s")
    parser.add_argument("--heads", type=int, default=5, help="default %(default)s")
    parser.add_argument("--head-dim", type=int, default=64, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="default %(default)s")


def run(args: argparse.Namespace) -> int:
    """Measures what the flags say; 1 if a variant was wrong or failed."""
    dtype = dtype_named(args.dtype)
    device = device_named("cpu" if args.rehearse else args.device, dtype)
    if args.rehearse:
        args.frames, args.positions, args.rounds = [4, 20], 32, 2
    rows, started = Rows(args.out), time.monotonic()
    torch.manual_seed(0)
    for frames in args.frames:
        shape = (args.batch, frames, args.positions, args.heads, args.head_dim)
        params = {
            "shape": shape,
            "dtype": args.dtype,
            "device": device.type,
            "rounds": args.rounds,
            "cpu kernel": native.status()[0],
        }
        if time.monotonic() - started > args.budget:
            rows.skip(f"temporal_attention/{frames}f", params, f"the budget of {args.budget:g} s is spent")
            continue
        try:
            table = time_shape(shape, dtype, device, args.rounds)
        except (RuntimeError, OSError) as error:
            rows.fail(f"temporal_attention/{frames}f", params, sentence(error))
            continue
        for name, found in table.items():
            if "error" in found:
                rows.fail(f"temporal_attention/{frames}f/{name}", params, f"off by {found['error']:.1e} relative L2")
            else:
                rows.write(f"temporal_attention/{frames}f/{name}", params, found)
    return 1 if rows.failures else 0
