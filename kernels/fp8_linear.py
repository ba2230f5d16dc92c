"""A linear layer in FP8 with what is before and behind it: the rounding of its input, bias and residual, or GEGLU.

    out = e4m3(x / step) @ weight.T * step * scale + bias + residual    or    out = value * gelu(gate), (value, gate) = the same

In PyTorch rounding, the FP8 product, the gate and the residual are separate passes. In half precision on a GPU each shape is
timed once: those passes run, or a Triton kernel that fuses them. Elsewhere PyTorch's product and the GEGLU of `geglu.py` run. A
layer norm rounds its own result (`fp8_layernorm.py`). A result that only another FP8 layer reads is rounded before it is
written.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_engine.kernels.gpu.autotune import autotune
from vstar_engine.kernels.gpu.device import device

from .fp8_quantize import to_e4m3, to_e4m3_ref
from .geglu import geglu, geglu_ref
from .problems import E4M3, Fp8LinearProblem, schema

PYTORCH = "PyTorch"


def linear_e4m3_ref(problem: Fp8LinearProblem) -> Tensor:
    """Computes the definition, with the product in float32, or in float64 for float64."""
    x, weight, step, scale, bias, residual, gate, then, dtype = problem
    wide = torch.promote_types(dtype, torch.float32)
    rows = to_e4m3_ref(x, step) if problem.rounds else x
    out = F.linear(rows.to(wide), weight.to(wide)) * (step.to(wide) * scale.to(wide))
    out = (out if bias is None else out + bias.to(wide)).to(dtype)
    if gate:
        out = geglu_ref(out)
    out = out if residual is None else residual + out
    return out if then is None else to_e4m3_ref(out, then)


def product(rows: Tensor, weight: Tensor, step: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiplies e4m3 rows (n, in) by an e4m3 weight (out, in), times both scales, and adds the bias."""
    # cuBLAS adds a bias in half precision only; else it is added in place, as a copy of the hidden values would be the peak
    within = None if dtype == torch.float32 else bias
    out = torch._scaled_mm(rows, weight.t(), scale_a=step, scale_b=scale, bias=within, out_dtype=dtype)
    return out if bias is None or within is not None else out.add_(bias)


def unfused(problem: Fp8LinearProblem) -> Tensor:
    """Computes by PyTorch's product; the rounding, the gate and the residual are separate passes."""
    x, weight, step, scale, bias, residual, gate, then, dtype = problem
    rows = (to_e4m3(x, step) if problem.rounds else x).reshape(-1, x.shape[-1])
    out = product(rows, weight, step, scale, bias, dtype).unflatten(0, x.shape[:-1])
    if gate:
        out = geglu(out)
    out = out if residual is None else residual + out
    return out if then is None else to_e4m3(out, then)


def _checked(problem: Fp8LinearProblem) -> Fp8LinearProblem:
    x, weight, step, scale, _, residual, gate, then, _ = problem
    if weight.dim() != 2 or weight.dtype != E4M3:
        raise ValueError(f"weight must be (out, in) {E4M3}, got {tuple(weight.shape)} {weight.dtype}")
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x must be (..., {weight.shape[1]}), got {tuple(x.shape)}")
    if gate and weight.shape[0] % 2:
        raise ValueError(f"a gated weight must have an even number of rows, got {weight.shape[0]}")
    for factor in (step, scale, step if then is None else then):
        if factor.shape != () or factor.dtype != torch.float32:
            raise ValueError(f"steps and scale must be float32 scalars, got {factor.dtype} {tuple(factor.shape)}")
    if residual is not None and residual.shape != problem.out_shape:
        raise ValueError(f"residual must be {problem.out_shape}, got {tuple(residual.shape)}")
    return problem


def candidates(problem: Fp8LinearProblem, arch: int) -> dict[str, Callable[[], Tensor]]:
    """Returns the implementations for a GPU by name, PyTorch's first; it is the only one for a plain product with a bias."""
    problem = problem._replace(weight=problem.weight.contiguous())
    found: dict[str, Callable[[], Tensor]] = {PYTORCH: partial(unfused, problem)}
    spared = problem.rounds or problem.residual is not None or problem.gate or problem.then is not None
    if spared and problem.x.numel():
        # imported here: a machine without Triton computes on its CPU
        from vstar_engine.kernels.gpu.fp8_linear import linear_e4m3_triton, tiles

        for tile in tiles(arch, problem.residual is not None, problem.gate):
            found[f"Triton, {tile.rows}x{tile.columns}x{tile.depth}"] = partial(linear_e4m3_triton, problem, tile)
    return found


def _compute(*given: Any) -> Tensor:
    problem = _checked(Fp8LinearProblem(*given))
    if problem.x.is_cuda and problem.dtype in (torch.float16, torch.bfloat16):
        return autotune(problem.case, candidates(problem, device(problem.x).arch))
    return unfused(problem)


_linear_e4m3 = torch.library.custom_op("vstar::linear_e4m3", _compute, mutates_args=(), schema=schema(Fp8LinearProblem))


@_linear_e4m3.register_fake
def _(*given: Any) -> Tensor:
    problem = _checked(Fp8LinearProblem(*given))
    return problem.x.new_empty(problem.out_shape, dtype=problem.out_dtype)


def linear_e4m3(problem: Fp8LinearProblem) -> Tensor:
    """Rounds x (..., in), multiplies by weight (out, in), and adds bias (out,) and residual, or applies GEGLU.

    The result has `dtype` or, where `then` gives the step of the next FP8 layer, is rounded to e4m3 for it.
    """
    return torch.ops.vstar.linear_e4m3(*problem)
