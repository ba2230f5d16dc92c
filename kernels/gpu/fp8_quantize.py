"""Triton kernel of `vstar::to_e4m3`: a program takes a block of neighbouring values."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vstar_engine.kernels.problems import E4M3

# values that a program rounds: 16 a thread, so that half precision is read 16 bytes at a time and e4m3 written so
BLOCK = 2048
WARPS = 4


@triton.jit
def rounded(x, per_step):
    """Rounds float32 x * per_step, a power of two, to e4m3, clamped to its range."""
    return tl.clamp(x * per_step, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def to_e4m3_kernel(x, step, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    y = tl.load(x + at, mask=inside).to(tl.float32)
    tl.store(out + at, rounded(y, 1.0 / tl.load(step)), mask=inside)


def to_e4m3_triton(x: Tensor, step: Tensor) -> Tensor:
    """Launches on contiguous x and a float32 number beside it."""
    out = torch.empty(x.shape, dtype=E4M3, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            to_e4m3_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, step, out, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return out
