"""Group norm and, if asked for, SiLU of (N, C, ...) in channels-last memory.

Statistics are float32's or wider and take two passes, E[x] and E[(x - E[x])^2]: E[x^2] - E[x]^2 would cancel. They are taken
block by block while the block lies in registers or cache, and joined; so x is read twice and the result written once, where
PyTorch's norm and SiLU take five passes, and on a GPU two more to leave channels-last memory and come back.
While a compiler traces, the definition itself is traced: compilers fuse it, and exported graphs hold standard operators alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_engine.kernels.cpu import calls, library

from .dispatch import decomposed, triton_serves


def groupnorm_silu_ref(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = True) -> Tensor:
    """Computes the definition: the norm in float32 or wider, rounded, then SiLU."""
    out = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(out) if silu else out


def _compute(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    rows = x.movedim(1, -1)
    if rows.is_contiguous() and triton_serves(x):
        # imported here: a machine without Triton computes on its CPU
        from vstar_engine.kernels.gpu.groupnorm_silu import groupnorm_silu_triton

        return groupnorm_silu_triton(rows, groups, weight, bias, eps, silu).movedim(-1, 1)
    if rows.is_contiguous() and library.serves(x):
        return calls.groupnorm_silu(rows, groups, weight, bias, eps, silu).movedim(-1, 1)
    # whatever the norm makes of the memory's layout, x's stays
    return torch.empty_like(x).copy_(groupnorm_silu_ref(x, groups, weight, bias, eps, silu))


def _check(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> None:
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x must be (N, C, ...) and not empty, got {tuple(x.shape)}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels, got {groups}")
    if weight.shape != x.shape[1:2] or bias.shape != x.shape[1:2]:
        shapes = f"{tuple(weight.shape)}, {tuple(bias.shape)}"
        raise ValueError(f"weight and bias must be ({x.shape[1]},), got {shapes}")


def _checked(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    _check(x, groups, weight, bias)
    return _compute(x, groups, weight, bias, eps, silu)


_groupnorm_silu = torch.library.custom_op("vstar::groupnorm_silu", _checked, mutates_args=())


@_groupnorm_silu.register_fake
def _(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    _check(x, groups, weight, bias)
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.groups, weight, bias, ctx.eps, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
    with torch.enable_grad():
        out = groupnorm_silu_ref(x, ctx.groups, weight, bias, ctx.eps, ctx.silu)
    for_x, for_weight, for_bias = torch.autograd.grad(out, (x, weight, bias), grad)
    return for_x, None, for_weight, for_bias, None, None


_groupnorm_silu.register_autograd(_backward, setup_context=_setup_context)


def groupnorm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = True) -> Tensor:
    """Normalises x over each group of channels, scales by weight, adds bias, and applies SiLU where `silu` is set.

    x is (N, C, ...), weight and bias are (C,); `groups` divides C. `eps` is added to the variance. Returns x's shape, dtype and
    memory layout; computes in float32 or wider. Raises ValueError for other shapes or an empty x. Group norm, arXiv 1803.08494.
    """
    if decomposed():
        return groupnorm_silu_ref(x, groups, weight, bias, eps, silu)
    compute = _checked if library.unwatched(x) and library.serves(x) else torch.ops.vstar.groupnorm_silu
    return compute(x, groups, weight, bias, eps, silu)
