"""A linear layer with what is before and behind it: the layer norm of its input, bias and residual, or GEGLU.

    out = x @ weight.T + bias + residual            or            out = value * gelu(gate), (value, gate) = x @ weight.T + bias

In PyTorch the norm, the product, the residual and the gate each write a tensor that the next one reads. In float32 on a CPU the
C++ library norms rows into the cache and adds bias and residual to the sums in registers. In half precision on a GPU each shape
is timed once: cuBLAS with separate passes runs, or a Triton kernel that fuses them. Elsewhere, and with gradients, PyTorch's
own product and the GEGLU of `geglu.py` run.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_engine.kernels.cpu import calls, library
from vstar_engine.kernels.gpu.autotune import autotune
from vstar_engine.kernels.gpu.device import device
from vstar_engine.kernels.gpu.temporal_attention_launch import ARCHITECTURES

from .dispatch import decomposed
from .geglu import geglu, geglu_ref
from .problems import LayerNorm, LinearProblem, schema

# features that 16-byte accesses take whole
MULTIPLE = 16
PYTORCH = "PyTorch"


def normed(x: Tensor, norm: LayerNorm | None) -> Tensor:
    """Returns x, its rows normed where a norm is given."""
    return x if norm is None else F.layer_norm(x, x.shape[-1:], *norm)


def linear_ref(problem: LinearProblem) -> Tensor:
    """Computes the definition by PyTorch's operators."""
    return _in_passes(problem, geglu_ref)


def unfused(problem: LinearProblem) -> Tensor:
    """Computes by PyTorch's product; the norm, the gate and the residual are separate passes."""
    return _in_passes(problem, geglu)


def _in_passes(problem: LinearProblem, gate: Callable[[Tensor], Tensor]) -> Tensor:
    out = F.linear(normed(problem.x, problem.norm), problem.weight, problem.bias)
    if problem.gate:
        out = gate(out)
    return out if problem.residual is None else problem.residual + out


def on_cpu(x: Tensor) -> bool:
    """Returns whether the C++ library computes layers over x."""
    ours = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()
    return ours and not decomposed() and library.serves(x)


def on_gpu(x: Tensor) -> bool:
    """Returns whether layers over x are computed by the faster of PyTorch's and Triton's products."""
    return x.dtype in (torch.float16, torch.bfloat16) and x.is_cuda and not torch.is_grad_enabled() and not decomposed()


def _checked(problem: LinearProblem) -> LinearProblem:
    x, weight = problem.x, problem.weight
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., {weight.shape[1]}), got {tuple(x.shape)}")
    if problem.gate and weight.shape[0] % 2:
        raise ValueError(f"a gated weight must have an even number of rows, got {weight.shape[0]}")
    return problem


def candidates(problem: LinearProblem, arch: int) -> dict[str, Callable[[], Tensor]]:
    """Returns the implementations for a GPU by name, PyTorch's first.

    PyTorch is the only one for a product with at most a bias, which cuBLAS adds itself, for features that are no multiple of
    MULTIPLE, for normed rows longer than a program holds, and for GPUs older than the launch table.
    """
    found: dict[str, Callable[[], Tensor]] = {PYTORCH: partial(unfused, problem)}
    spared = problem.gain is not None or problem.residual is not None or problem.gate
    whole = not problem.out_shape[-1] % MULTIPLE and not problem.weight.shape[1] % MULTIPLE
    if spared and whole and problem.x.numel() and arch >= ARCHITECTURES[0]:
        # imported here: a machine without Triton computes on its CPU
        from vstar_engine.kernels.gpu.linear import LONGEST, linear_triton, tiles

        if problem.gain is None or problem.weight.shape[1] <= LONGEST:
            for tile in tiles(arch, problem.gate):
                found[f"Triton, {tile.rows}x{tile.columns}"] = partial(linear_triton, problem, tile)
    return found


def _on_cpu(*given: Any) -> Tensor:
    return calls.linear(_checked(LinearProblem(*given)).contiguous())


_linear = torch.library.custom_op("vstar::linear", _on_cpu, mutates_args=(), device_types="cpu", schema=schema(LinearProblem))


@_linear.register_kernel("cuda")
def _on_gpu(*given: Any) -> Tensor:
    problem = _checked(LinearProblem(*given))
    return autotune(problem.case, candidates(problem, device(problem.x).arch))


@_linear.register_fake
def _(*given: Any) -> Tensor:
    problem = LinearProblem(*given)
    return problem.x.new_empty(problem.out_shape)


def linear(problem: LinearProblem) -> Tensor:
    """Computes x @ weight.T + bias + residual, or GEGLU of x @ weight.T + bias; x is layer-normed first where norm is set.

    x is (..., in), weight (out, in), bias (out,), residual (..., out), all of one dtype. The norm's gain and shift are (in,).
    Returns (..., out), with the gate (..., out // 2), in x's dtype. Raises ValueError for features that do not agree, or an odd
    number of them with the gate.
    """
    x = problem.x
    if on_cpu(x) or on_gpu(x):
        compute = _on_cpu if x.device.type == "cpu" and library.unwatched(x) else torch.ops.vstar.linear
        return compute(*problem)
    return unfused(problem)


def feed_forward(
    x: Tensor, first: tuple[Tensor, Tensor | None], second: tuple[Tensor, Tensor | None], norm: LayerNorm
) -> Tensor:
    """Returns x + second(geglu(first(norm(x)))) for x (..., width) and two layers, each (weight, bias).

    On a CPU both run block by block of rows, so that the hidden values, four times as wide as x, stay in the cache.
    """
    width, inner = second[0].shape
    if x.shape[-1] != width or first[0].shape != (2 * inner, width):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, first[0], second[0]))
        raise ValueError(f"x and weights must be (..., width), (2 * inner, width), (width, inner), got {shapes}")
    if on_cpu(x) and library.unwatched(x):
        one, two = ((weight.contiguous(), bias) for weight, bias in (first, second))
        return calls.feed_forward(x.contiguous(), one, two, norm)
    hidden = linear(LinearProblem(x, *first, None, True, norm.weight, norm.bias, norm.eps))
    return linear(LinearProblem(hidden, *second, x))
