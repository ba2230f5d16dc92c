"""Triton kernel of `vstar::to_e4m3`: a program takes a block of neighbouring values."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .e4m3 import E4M3

# values that a program rounds: 16 a thread, so that half precision is read 16 bytes at a time and e4m3 written so
BLOCK = 2048
WARPS = 4


@triton.jit
def to_e4m3_kernel(x, step, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    y = tl.load(x + at, mask=inside).to(tl.float32) / tl.load(step)
    y = tl.clamp(y, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def to_e4m3_triton(x: Tensor, step: Tensor) -> Tensor:
    """Launches on contiguous x and a float32 number beside it."""
    out = torch.empty(x.shape, dtype=E4M3, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            to_e4m3_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, step, out, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return out
