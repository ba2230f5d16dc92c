"""A linear layer and what follows it, over float32 rows on a CPU: bias and residual, or GEGLU, added where the sums still are.

    out = x @ weight.T + bias + residual            or            out = value * gelu(gate), (value, gate) = x @ weight.T + bias

PyTorch's product, or its 1x1 convolution over the same bytes, writes the sums, and an operator behind it reads them again.
Elsewhere than in float32 on a CPU without gradients the definition runs: PyTorch's own product, and the GEGLU of `geglu.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .geglu import geglu, geglu_ref


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, gate: bool = False) -> Tensor:
    """Computes the definition."""
    out = F.linear(x, weight, bias)
    if gate:
        out = geglu_ref(out)
    return out if residual is None else residual + out


@torch.library.custom_op("vstar::linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gate: bool) -> Tensor:
    if x.shape[-1] != weight.shape[1] or (gate and weight.shape[0] % 2):
        raise ValueError(
            f"x (..., {weight.shape[1]}) and, to gate, an even number of features are wanted, got "
            f"{tuple(x.shape)} and {weight.shape[0]}"
        )
    residual = None if residual is None else residual.contiguous()
    return native.linear(x.contiguous(), weight.contiguous(), bias, residual, gate)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gate: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2 if gate else weight.shape[0]))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, gate: bool = False) -> Tensor:
    """Multiplies x (..., in) by weight (out, in); adds bias (out,) and a residual like the result; or gates half by half."""
    ours = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()
    if ours and not torch.compiler.is_compiling() and native.serves(x):
        return torch.ops.vstar.linear(x, weight, bias, residual, gate)
    out = F.linear(x, weight, bias)
    if gate:
        out = geglu(out)
    return out if residual is None else residual + out
