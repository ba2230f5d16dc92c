"""Rounding to FP8 (e4m3): divide by a step, clamp to e4m3's range, round to the nearest.

PyTorch's three operators move 11 bytes a half-precision value, the fused kernel 3. A program of the Triton kernel takes a block
of neighbouring values. FP8 needs compute capability 8.9 or newer.
"""

import torch
from torch import Tensor

from .dispatch import triton_serves
from .problems import E4M3

LARGEST = torch.finfo(E4M3).max


def to_e4m3_ref(x: Tensor, step: Tensor) -> Tensor:
    """Computes the definition; division by `step`, a power of two, is exact in any dtype."""
    return (x / step.to(x.dtype)).clamp(-LARGEST, LARGEST).to(E4M3)


@torch.library.custom_op("vstar::to_e4m3", mutates_args=())
def _to_e4m3(x: Tensor, step: Tensor) -> Tensor:
    if step.shape != () or step.dtype != torch.float32:
        raise ValueError(f"step must be a float32 scalar, got {step.dtype} {tuple(step.shape)}")
    x = x.contiguous()
    if triton_serves(x):
        # imported here: a machine without Triton computes on its CPU
        from vstar_engine.kernels.gpu.fp8_quantize import to_e4m3_triton

        return to_e4m3_triton(x, step)
    return to_e4m3_ref(x, step)


@_to_e4m3.register_fake
def _(x: Tensor, step: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=E4M3)


def to_e4m3(x: Tensor, step: Tensor) -> Tensor:
    """Rounds x / step to e4m3, contiguous and shaped like x; under a compiler, by standard operators."""
    return to_e4m3_ref(x, step) if torch.compiler.is_compiling() else torch.ops.vstar.to_e4m3(x, step)
