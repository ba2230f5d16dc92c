"""A linear layer with what is before and behind it: the layer norm of its input, bias and residual, or GEGLU.

    out = x @ weight.T + bias + residual            or            out = value * gelu(gate), (value, gate) = x @ weight.T + bias

PyTorch's norm writes what the product reads again, and so does the product for what is behind it. In float32 on a CPU rows are
normed into the cache, and the rest is added where the sums still are; in half precision on a GPU a Triton kernel that does so
runs where it was timed to be faster (`linear_gpu.py`). Elsewhere, and with gradients, the definition runs: PyTorch's own
product, and the GEGLU of `geglu.py`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_engine.kernels.cpu import calls, library

from .dispatch import decomposed
from .geglu import geglu, geglu_ref


class LayerNorm(NamedTuple):
    """A layer norm over the last axis: weight (in,), bias (in,) and what is added to the variance."""

    weight: Tensor
    bias: Tensor
    eps: float


def normed(x: Tensor, norm: LayerNorm | None) -> Tensor:
    """Norms the rows of x, where there is a norm."""
    return x if norm is None else F.layer_norm(x, x.shape[-1:], *norm)


def linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    gate: bool = False,
    norm: LayerNorm | None = None,
) -> Tensor:
    """Computes the definition."""
    out = F.linear(normed(x, norm), weight, bias)
    if gate:
        out = geglu_ref(out)
    return out if residual is None else residual + out


def on_cpu(x: Tensor) -> bool:
    """Returns whether the CPU's kernels compute layers over x."""
    ours = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()
    return ours and not decomposed() and library.serves(x)


def on_gpu(x: Tensor) -> bool:
    """Returns whether layers over x are computed by the faster of PyTorch's and Triton's products."""
    return x.dtype in (torch.float16, torch.bfloat16) and x.is_cuda and not torch.is_grad_enabled() and not decomposed()


def by_operators(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: bool,
    norm: LayerNorm | None,
) -> Tensor:
    """Computes by PyTorch's product, the norm, the gate and the residual in passes of their own."""
    out = F.linear(normed(x, norm), weight, bias)
    if gate:
        out = geglu(out)
    return out if residual is None else residual + out


def _check(x: Tensor, weight: Tensor, gate: bool) -> None:
    if x.shape[-1] != weight.shape[1] or (gate and weight.shape[0] % 2):
        raise ValueError(
            f"x (..., {weight.shape[1]}) and, to gate, an even number of features are wanted, got "
            f"{tuple(x.shape)} and {weight.shape[0]}"
        )


def _compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: bool,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> Tensor:
    _check(x, weight, gate)
    residual = None if residual is None else residual.contiguous()
    return calls.linear(x.contiguous(), weight.contiguous(), bias, residual, gate, gain, shift, eps)


_linear = torch.library.custom_op("vstar::linear", _compute, mutates_args=(), device_types="cpu")


@_linear.register_kernel("cuda")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: bool,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> Tensor:
    _check(x, weight, gate)
    # imported here: a machine without Triton computes on its CPU
    from vstar_engine.kernels.gpu.linear_candidates import linear_gpu

    return linear_gpu(x, weight, bias, residual, gate, gain, shift, eps)


@_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: bool,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2 if gate else weight.shape[0]))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    gate: bool = False,
    norm: LayerNorm | None = None,
) -> Tensor:
    """Multiplies x (..., in), normed, by weight (out, in); adds bias (out,) and a residual; or gates one half by the other."""
    if on_cpu(x) or on_gpu(x):
        gain, shift, eps = norm or (None, None, 0.0)
        compute = _compute if x.device.type == "cpu" and library.unwatched(x) else torch.ops.vstar.linear
        return compute(x, weight, bias, residual, gate, gain, shift, eps)
    return by_operators(x, weight, bias, residual, gate, norm)


def feed_forward(
    x: Tensor, first: tuple[Tensor, Tensor | None], second: tuple[Tensor, Tensor | None], norm: LayerNorm
) -> Tensor:
    """Adds to x (..., width) what two layers, each (weight, bias), make of it, normed; the first gates.

    In one go what the first makes, four times as wide as x, never leaves the cache.
    """
    width, inner = second[0].shape
    if x.shape[-1] != width or first[0].shape != (2 * inner, width):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, first[0], second[0]))
        raise ValueError(f"x (..., width), weights (2 * inner, width) and (width, inner) are wanted, got {shapes}")
    if on_cpu(x) and library.unwatched(x):
        one, two = ((weight.contiguous(), bias) for weight, bias in (first, second))
        return calls.feed_forward(x.contiguous(), one, two, *norm)
    return linear(linear(x, *first, gate=True, norm=norm), *second, x)
