"""Times temporal attention on this machine's CPU against the published path and PyTorch's own attention.

    python -m vstar_engine.bench.kernels --frames 16 32 64 128

Every variant starts from the fused projection's q, k, v (1, T, P, heads, head_dim), ends in that layout, and is checked against
float64 at a few positions before it is timed.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vstar_engine.kernels import native
from vstar_engine.kernels.temporal_attention import temporal_attention, temporal_attention_ref, toeplitz_bias

from vstar_engine.tar import toeplitz

from .timing import Timing, interleave

TOLERANCE = 1e-5
GEMM_SIZE = 1024
OURS, OURS_PLAIN, PUBLISHED, PLAIN_SDPA = "ours", "ours, g = 0", "published path", "SDPA, no regulariser"


def split_heads(x: Tensor) -> Tensor:
    """(1, T, P, H, D) -> (P * H, T, D), copied, as attention over a batch of sequences wants it."""
    _, frames, positions, heads, width = x.shape
    return x[0].permute(1, 2, 0, 3).reshape(positions * heads, frames, width).contiguous()


def merge_heads(x: Tensor, like: Tensor) -> Tensor:
    _, frames, positions, heads, width = like.shape
    return x.view(positions, heads, frames, width).permute(2, 0, 1, 3).contiguous()[None]


def published(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The published model's passes: copies, scale, an unused softmax, row max, bias, sum, softmax, the stored head mean."""
    heads, frames = q.shape[3], q.shape[1]
    split_q, split_k, split_v = split_heads(q), split_heads(k), split_heads(v)
    phi = torch.einsum("bid,bjd->bij", split_q, split_k) * q.shape[-1] ** -0.5
    phi.softmax(dim=-1)
    delta = phi.amax(dim=-1, keepdim=True) * toeplitz_bias(g, frames, frames)
    probs = (phi + delta).softmax(dim=-1)
    probs.view(-1, heads, frames, frames).mean(dim=1)
    return merge_heads(torch.einsum("bij,bjd->bid", probs, split_v), q)


def sdpa_two_pass(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Row max first, then PyTorch's attention with the bias as its additive mask."""
    split_q, split_k, split_v = split_heads(q), split_heads(k), split_heads(v)
    row_max = (split_q @ split_k.mT).amax(dim=-1, keepdim=True) * q.shape[-1] ** -0.5
    mask = row_max * toeplitz_bias(g, q.shape[1], q.shape[1])
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


def check(name: str, run: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> None:
    here = slice(0, 3)
    bias = torch.zeros_like(g) if name in (OURS_PLAIN, PLAIN_SDPA) else g
    exact = temporal_attention_ref(q[:, :, here].double(), k[:, :, here].double(), v[:, :, here].double(), bias)
    error = float((run()[:, :, here].double() - exact).norm() / exact.norm())
    if error > TOLERANCE:
        raise ValueError(f"{name} is off by {error:.1e}, at most {TOLERANCE:.0e}")


def gemm() -> Callable[[], Tensor]:
    """A matrix product that stays in the caches: the machine's multiply-add peak as this run finds it."""
    a, b, out = (torch.randn(GEMM_SIZE, GEMM_SIZE) for _ in range(3))
    return partial(torch.mm, a, b, out=out)


def report(frames: int, positions: int, heads: int, head_dim: int, rounds: int) -> list[str]:
    q, k, v = torch.randn(1, frames, positions, 3, heads, head_dim).unbind(3)
    g = toeplitz(frames, 1.0)[None]
    runs = variants(q, k, v, g)
    for name, run in runs.items():
        check(name, run, q, k, v, g)
    # a run of the same kind goes before each: what the kernel must map again depends on what the run before gave back to it
    pairs = {settling + name: run for name, run in {**runs, "gemm": gemm()}.items() for settling in ("settling ", "")}
    timings = {name: timing for name, timing in interleave(pairs, rounds, warmup=1).items() if "settling" not in name}
    peak = 2 * GEMM_SIZE**3 / timings.pop("gemm").median
    flops = 4 * frames**2 * head_dim * positions * heads
    ours = timings[OURS].median
    return [row(frames, name, timing, ours, flops / timing.median / peak) for name, timing in timings.items()]


def row(frames: int, name: str, timing: Timing, ours: float, share: float) -> str:
    span = f"{timing.median * 1e3:.1f} [{timing.p20 * 1e3:.1f}, {timing.p80 * 1e3:.1f}]"
    return f"| {frames} | {name} | {span} | {timing.median / ours:.2f} | {share:.0%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--positions", type=int, default=2560)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    present, where = native.status()
    print(f"torch {torch.__version__}, {args.threads} threads, fp32, {args.positions} x {args.heads} x {args.head_dim}")
    print(f"CPU kernel: {where if present else 'absent: ' + where}")
    print("| T | variant | ms, median [p20, p80] | times ours | share of GEMM peak |\n|--:|---|--:|--:|--:|")
    for frames in args.frames:
        print("\n".join(report(frames, args.positions, args.heads, args.head_dim, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
