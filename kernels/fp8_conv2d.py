"""A convolution in FP8: e4m3 images by an e4m3 kernel, summed in float32, times both scales, and the bias.

    out = conv(x, weight) * step * scale + bias

Images and kernel are channels-last, (N, H, W, C) and (O, kh, kw, C). PyTorch multiplies matrices in FP8 but has no convolution
in it, and to write every window of an image out as a row of a matrix would move 9 times the image for a 3x3 kernel. On a GPU a
Triton kernel reads the windows where they lie. Elsewhere PyTorch convolves the same values in float32, which holds them all.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import triton_serves
from .fp8_quantize import E4M3


def conv_e4m3_ref(
    x: Tensor, weight: Tensor, step: Tensor, scale: Tensor, bias: Tensor, stride: int, padding: Sequence[int]
) -> Tensor:
    """Computes the definition, in float32 or, with a bias in it, float64."""
    wide = torch.promote_types(bias.dtype, torch.float32)
    images, kernel = (tensor.to(wide).movedim(-1, 1) for tensor in (x, weight))
    out = F.conv2d(images, kernel, None, stride, tuple(padding)).movedim(1, -1)
    return torch.addcmul(bias.to(wide), out, (step * scale).to(wide)).to(bias.dtype).contiguous()


def sides(x: Tensor, weight: Tensor, stride: int, padding: Sequence[int]) -> tuple[int, int]:
    """Returns the height and width of what is made."""
    height, width = (
        (side + 2 * beyond - kernel) // stride + 1
        for side, beyond, kernel in zip(x.shape[1:3], padding, weight.shape[1:3], strict=True)
    )
    return height, width


def _check(
    x: Tensor, weight: Tensor, step: Tensor, scale: Tensor, bias: Tensor, stride: int, padding: Sequence[int]
) -> tuple[int, ...]:
    """Returns the shape of the result."""
    if x.dim() != 4 or weight.dim() != 4 or x.shape[-1] != weight.shape[-1] or bias.shape != weight.shape[:1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, weight, bias))
        raise ValueError(f"x (N, H, W, C), weight (O, kh, kw, C) and bias (O,) are wanted, got {shapes}")
    if x.dtype != E4M3 or weight.dtype != E4M3:
        raise ValueError(f"x and weight are wanted in e4m3, got {x.dtype} and {weight.dtype}")
    for factor in (step, scale):
        if factor.shape != () or factor.dtype != torch.float32:
            raise ValueError(f"step and scale are float32 numbers on x's device, got {factor.dtype} {tuple(factor.shape)}")
    if stride < 1 or len(padding) != 2 or min(padding) < 0:
        raise ValueError(f"a stride from 1 up and two paddings from 0 up are wanted, got {stride} and {list(padding)}")
    made = sides(x, weight, stride, padding)
    if min(made) < 1 or x.numel() == 0:
        raise ValueError(
            f"nothing is left of {tuple(x.shape)} by a kernel {tuple(weight.shape[1:3])}, padded by {list(padding)}"
        )
    return (x.shape[0], *made, weight.shape[0])


@torch.library.custom_op("vstar::conv_e4m3", mutates_args=())
def conv_e4m3(
    x: Tensor, weight: Tensor, step: Tensor, scale: Tensor, bias: Tensor, stride: int, padding: Sequence[int]
) -> Tensor:
    """Convolves x (N, H, W, C) with weight (O, kh, kw, C), padded by zeros, to (N, H', W', O) in the dtype of bias (O,)."""
    _check(x, weight, step, scale, bias, stride, padding)
    if triton_serves(x):
        # imported here: a machine without Triton computes on its CPU
        from vstar_engine.kernels.gpu.fp8_conv2d import conv_e4m3_gpu

        return conv_e4m3_gpu(x.contiguous(), weight.contiguous(), step, scale, bias, stride, padding)
    return conv_e4m3_ref(x, weight, step, scale, bias, stride, padding)


@conv_e4m3.register_fake
def _(x: Tensor, weight: Tensor, step: Tensor, scale: Tensor, bias: Tensor, stride: int, padding: Sequence[int]) -> Tensor:
    return bias.new_empty(_check(x, weight, step, scale, bias, stride, padding))
