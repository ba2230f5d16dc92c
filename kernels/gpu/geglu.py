"""Triton kernel of `vstar::geglu`: a program takes a block of neighbouring columns of one row.

Both halves of a block and its product are contiguous, so every access is 16 bytes a thread.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# elements a program makes at most
BLOCK = 1024


@triton.jit(do_not_specialize=("blocks",))
def geglu_kernel(x, out, inner, blocks, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    value = x + row * 2 * inner + column
    inside = None if EVEN else column < inner
    v = tl.load(value, mask=inside).to(tl.float32)
    g = tl.load(value + inner, mask=inside).to(tl.float32)
    y = v * (0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476)))
    tl.store(out + row * inner + column, y.to(out.dtype.element_ty), mask=inside)


def warps(block: int) -> int:
    """Returns the warps of a block: a thread takes eight elements, which fill a 16-byte access in half precision."""
    return max(1, block // 256)


def constants(inner: int) -> dict[str, Any]:
    """Returns the values that the kernel is compiled for."""
    block = min(BLOCK, triton.next_power_of_2(inner))
    # the largest power of two that divides a row wastes no lane, where it is not too small to be worth a program
    exact = inner & -inner
    block = exact if BLOCK // 4 <= exact < block else block
    return {"BLOCK": block, "EVEN": inner % block == 0}


def geglu_triton(x: Tensor) -> Tensor:
    """Launches on contiguous x (..., 2 * inner) -> (..., inner)."""
    inner = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], inner))
    values = constants(inner)
    blocks = triton.cdiv(inner, values["BLOCK"])
    with torch.cuda.device_of(x):
        geglu_kernel[(out.numel() // inner * blocks,)](x, out, inner, blocks, **values, num_warps=warps(values["BLOCK"]))
    return out
