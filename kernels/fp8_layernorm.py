"""A layer norm fused with rounding to FP8: norm, divide by a step, clamp to e4m3's range, round.

As separate operators these move 7 bytes a half-precision value, here 3. A program of the Triton kernel holds whole rows. The
norm is not fused into the product that follows: there every tile of columns would norm and round the same rows again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import triton_serves
from .fp8_quantize import to_e4m3, to_e4m3_ref
from .problems import E4M3


def norm_e4m3_ref(x: Tensor, gain: Tensor, shift: Tensor, eps: float, step: Tensor) -> Tensor:
    """Computes the definition."""
    return to_e4m3_ref(F.layer_norm(x, x.shape[-1:], gain, shift, eps), step)


@torch.library.custom_op("vstar::norm_e4m3", mutates_args=())
def norm_e4m3(x: Tensor, gain: Tensor, shift: Tensor, eps: float, step: Tensor) -> Tensor:
    """Norms rows of x (..., width) by gain and shift (width,), divides by step, a power of two, and rounds to e4m3."""
    _check(x, gain, shift, step)
    if triton_serves(x):
        # imported here: a machine without Triton computes on its CPU
        from vstar_engine.kernels.gpu.fp8_layernorm import norm_e4m3_triton
        from vstar_engine.kernels.gpu.linear import LONGEST

        if x.shape[-1] <= LONGEST:
            return norm_e4m3_triton(x.contiguous(), gain, shift, eps, step)
    return to_e4m3(F.layer_norm(x, x.shape[-1:], gain, shift, eps), step)


@norm_e4m3.register_fake
def _(x: Tensor, gain: Tensor, shift: Tensor, eps: float, step: Tensor) -> Tensor:
    _check(x, gain, shift, step)
    return x.new_empty(x.shape, dtype=E4M3)


def _check(x: Tensor, gain: Tensor, shift: Tensor, step: Tensor) -> None:
    if not x.dim() or gain.shape != x.shape[-1:] or shift.shape != x.shape[-1:]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, gain, shift))
        raise ValueError(f"x, gain and shift must be (..., width), (width,) and (width,), got {shapes}")
    if step.shape != () or step.dtype != torch.float32:
        raise ValueError(f"step must be a float32 scalar, got {step.dtype} {tuple(step.shape)}")
