"""A convolution in FP8: e4m3 images by an e4m3 kernel, summed in float32, times both scales, and the bias.

    out = conv(x, weight) * step * scale + bias

Images and kernel are channels-last, (N, H, W, C) and (O, kh, kw, C). PyTorch has FP8 products of matrices but no FP8
convolution, and unfolding an image into a matrix moves it 9 times for a 3x3 kernel. On a GPU a Triton kernel reads the windows
in place. Elsewhere PyTorch convolves the same values in float32, which holds every e4m3 number.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_engine.kernels.gpu.autotune import autotune
from vstar_engine.kernels.gpu.device import device

from .dispatch import triton_serves
from .problems import E4M3, Fp8ConvProblem, schema


def conv_e4m3_ref(problem: Fp8ConvProblem) -> Tensor:
    """Computes the definition in float32, or in float64 where the bias is."""
    x, weight, step, scale, bias, stride, padding = problem
    wide = torch.promote_types(bias.dtype, torch.float32)
    images, kernel = (tensor.to(wide).movedim(-1, 1) for tensor in (x, weight))
    out = F.conv2d(images, kernel, None, stride, tuple(padding)).movedim(1, -1)
    return torch.addcmul(bias.to(wide), out, (step * scale).to(wide)).to(bias.dtype).contiguous()


def _checked(problem: Fp8ConvProblem) -> Fp8ConvProblem:
    x, weight, step, scale, bias, stride, padding = problem
    if x.dim() != 4 or weight.dim() != 4 or x.shape[-1] != weight.shape[-1] or bias.shape != weight.shape[:1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, weight, bias))
        raise ValueError(f"x, weight and bias must be (N, H, W, C), (O, kh, kw, C) and (O,), got {shapes}")
    if x.dtype != E4M3 or weight.dtype != E4M3:
        raise ValueError(f"x and weight must be {E4M3}, got {x.dtype} and {weight.dtype}")
    for factor in (step, scale):
        if factor.shape != () or factor.dtype != torch.float32:
            raise ValueError(f"step and scale must be float32 scalars, got {factor.dtype} {tuple(factor.shape)}")
    if stride < 1 or len(padding) != 2 or min(padding) < 0:
        raise ValueError(f"stride must be at least 1 and padding two numbers from 0 up, got {stride} and {list(padding)}")
    if min(problem.out_shape[1:3]) < 1 or x.numel() == 0:
        raise ValueError(
            f"x {tuple(x.shape)}, padded by {list(padding)}, must not be smaller than the kernel {tuple(weight.shape[1:3])}"
        )
    return problem


def candidates(problem: Fp8ConvProblem, arch: int) -> dict[str, Callable[[], Tensor]]:
    """Returns a launch for each tile of the table, by name."""
    # imported here: a machine without Triton computes on its CPU
    from vstar_engine.kernels.gpu.fp8_conv2d import conv_e4m3_triton, tiles

    return {f"{tile.rows}x{tile.columns}x{tile.depth}": partial(conv_e4m3_triton, problem, tile) for tile in tiles(arch)}


def _compute(*given: Any) -> Tensor:
    problem = _checked(Fp8ConvProblem(*given))
    if not triton_serves(problem.x):
        return conv_e4m3_ref(problem)
    found = candidates(problem, device(problem.x).arch)
    # the interpreter cannot be timed
    return autotune(problem.case, found) if problem.x.is_cuda else next(iter(found.values()))()


_conv_e4m3 = torch.library.custom_op("vstar::conv_e4m3", _compute, mutates_args=(), schema=schema(Fp8ConvProblem))


@_conv_e4m3.register_fake
def _(*given: Any) -> Tensor:
    problem = _checked(Fp8ConvProblem(*given))
    return problem.bias.new_empty(problem.out_shape)


def conv_e4m3(problem: Fp8ConvProblem) -> Tensor:
    """Convolves x (N, H, W, C) with weight (O, kh, kw, C), padded by zeros, to (N, H', W', O) in the dtype of bias (O,)."""
    return torch.ops.vstar.conv_e4m3(*problem)
