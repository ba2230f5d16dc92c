"""GEGLU: value * gelu(gate) of (..., 2 * inner) halves, values first, by the exact GELU.

PyTorch's two operators make 5 passes over (..., inner), the fused kernel 3: it reads each half and writes the product.
Arithmetic is in float32, or wider for float64. A program of the Triton kernel takes a block of neighbouring columns of one row.
While a compiler traces, the definition itself is traced: compilers fuse it, and exported graphs hold standard operators alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_engine.kernels.cpu import calls, library

from .dispatch import decomposed, triton_serves


def geglu_ref(x: Tensor) -> Tensor:
    """Computes the definition: (..., 2 * inner) -> (..., inner)."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _compute(x: Tensor) -> Tensor:
    if triton_serves(x):
        # imported here: a machine without Triton computes on its CPU
        from vstar_engine.kernels.gpu.geglu import geglu_triton

        return geglu_triton(x.contiguous())
    return calls.geglu(x.contiguous()) if library.serves(x) else geglu_ref(x)


@torch.library.custom_op("vstar::geglu", mutates_args=())
def _geglu(x: Tensor) -> Tensor:
    if x.dim() < 1 or x.shape[-1] % 2 or x.numel() == 0:
        raise ValueError(f"x must be (..., 2 * inner), values then gates, and not empty, got {tuple(x.shape)}")
    return _compute(x)


@_geglu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = geglu_ref(leaf)
    return torch.autograd.grad(out, leaf, grad)[0]


_geglu.register_autograd(_backward, setup_context=_setup_context)


def geglu(x: Tensor) -> Tensor:
    """Multiplies the first half of the last axis by the exact GELU of the second: (..., 2 * inner) -> (..., inner).

    The result is contiguous and in x's dtype; computes in float32 or wider. Raises ValueError for an odd last axis or an empty
    x. GEGLU, arXiv 2002.05202.
    """
    return geglu_ref(x) if decomposed() else torch.ops.vstar.geglu(x)
