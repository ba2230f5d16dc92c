"""FP8 layers: weights and inputs rounded to e4m3 (arXiv 2209.05433) by a scale for each tensor, products summed wider.

A weight's scale comes from its largest value, an input's from the largest value seen while the network samples a short clip.
Linear layers run `vstar::linear_e4m3` with the same fusions as exact layers, convolutions run `vstar::conv_e4m3`. The first and
the last convolution, from and to the latents' four channels, and the K and V projections of texts stay exact: they are little
work.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vstar_engine.errors import DeviceError
from vstar_engine.kernels.fp8_conv2d import conv_e4m3
from vstar_engine.kernels.fp8_layernorm import norm_e4m3
from vstar_engine.kernels.fp8_linear import linear_e4m3, product
from vstar_engine.kernels.fp8_quantize import LARGEST, to_e4m3
from vstar_engine.kernels.linear import normed
from vstar_engine.kernels.problems import E4M3, Fp8ConvProblem, Fp8LinearProblem, LayerNorm

from .layers import CrossAttention, FeedForward, FrameConv, Linear
from .unet import UNet

# rows and columns of the product are multiples of this
MULTIPLE = 16
Layer = Linear | nn.Conv2d | FrameConv


def step_for(largest: float) -> float:
    """Returns the power of two that scales values up to `largest`, with at most twice that as headroom, into e4m3's range.

    Division by a power of two is exact in every dtype.
    """
    return 2.0 ** (1 + math.ceil(math.log2(max(largest, 1e-12) / LARGEST)))


class Fp8Layer(nn.Module):
    """A layer's weight rounded to e4m3, output channels first, and the scale (`step`) of inputs up to `largest`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, largest: float):
        super().__init__()
        scale = weight.float().abs().amax().clamp(min=1e-12) / LARGEST
        self.weight: Tensor
        self.scale: Tensor
        self.step: Tensor
        self.register_buffer("weight", (weight.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3))
        self.register_buffer("scale", scale)
        self.register_buffer("step", scale.new_tensor(step_for(largest)))
        self.bias = bias


class Fp8Linear(Fp8Layer):
    """A linear layer; its output is rounded to e4m3 by the scale `then` where only one FP8 layer reads it."""

    def __init__(self, layer: Linear | nn.Conv2d, largest: float):
        super().__init__(layer.weight.detach().flatten(1), layer.bias, largest)
        self.dtype = layer.weight.dtype
        self.then: Tensor | None
        self.register_buffer("then", None)

    def forward(self, x: Tensor, residual: Tensor | None = None, gate: bool = False, norm: LayerNorm | None = None) -> Tensor:
        rows = x if norm is None else norm_e4m3(x, *norm, self.step)
        given = (rows, self.weight, self.step, self.scale, self.bias, residual, gate, self.then, self.dtype)
        return linear_e4m3(Fp8LinearProblem(*given))


class Fp8Pointwise(Fp8Linear):
    """A 1x1 convolution of (N, C, H, W) as a linear layer."""

    def forward(self, x: Tensor, residual: Tensor | None = None, gate: bool = False, norm: LayerNorm | None = None) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1), residual, gate, norm).permute(0, 3, 1, 2)


class Fp8Convolution(Fp8Layer):
    """A convolution of (N, C, H, W) in channels-last memory, or over the frames of (B, C, T, P)."""

    def __init__(self, layer: nn.Conv2d | FrameConv, largest: float):
        super().__init__(layer.weight.detach().flatten(3).movedim(1, -1).contiguous(), layer.bias, largest)
        self.stride, self.padding = layer.stride[0], layer.padding[:2]

    def forward(self, x: Tensor) -> Tensor:
        images = to_e4m3(x.movedim(1, -1), self.step)
        given = (images, self.weight, self.step, self.scale, self.bias, self.stride, self.padding)
        return conv_e4m3(Fp8ConvProblem(*given)).movedim(-1, 1)


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raises DeviceError unless PyTorch multiplies in FP8 on the device."""
    ones = torch.ones(MULTIPLE, MULTIPLE, device=device)
    small, one = ones.to(E4M3), ones[0, 0]
    try:
        product(small, small, one, one, ones[0].to(dtype), dtype)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(
            f"{device} does not multiply in FP8, as GPUs of compute capability 8.9 and more do: {reason}"
        ) from error


def layers(unet: UNet) -> dict[str, Layer]:
    """Returns the layers that run in FP8 by name: linear layers and convolutions whose sizes are multiples of MULTIPLE."""
    found: dict[str, Layer] = {}
    for name, module in unet.named_modules():
        kept = {module.to_kv} if isinstance(module, CrossAttention) else set()
        for part, layer in module.named_children():
            taken = isinstance(layer, Layer) and layer not in kept
            if taken and not any(side % MULTIPLE for side in layer.weight.shape[:2]):
                found[f"{name}.{part}"] = layer
    return found


@contextmanager
def watched(unet: UNet) -> Iterator[dict[str, float]]:
    """Records the largest input of each layer inside the block."""
    largest: dict[str, float] = {}

    def note(name: str, x: Tensor, norm: LayerNorm | None = None, **_: object) -> None:
        largest[name] = max(largest.get(name, 0.0), float(normed(x, norm).abs().amax()))

    hooks = [
        layer.register_forward_pre_hook(lambda _, given, named, name=name: note(name, given[0], **named), with_kwargs=True)
        for name, layer in layers(unet).items()
    ]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


def small(layer: Layer, largest: float) -> Fp8Layer:
    """Returns the FP8 version of a layer."""
    if isinstance(layer, Linear):
        return Fp8Linear(layer, largest)
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
        return Fp8Pointwise(layer, largest)
    return Fp8Convolution(layer, largest)


def convert(unet: UNet, largest: Mapping[str, float]) -> None:
    """Replaces the layers named in `largest` by FP8 layers scaled to these inputs."""
    found = layers(unet)
    for name, most in largest.items():
        parent, _, part = name.rpartition(".")
        setattr(unet.get_submodule(parent), part, small(found[name], most))
    for module in unet.modules():
        if isinstance(module, FeedForward):
            first, second = module.net[0].proj, module.net[2]
            if isinstance(first, Fp8Linear) and isinstance(second, Fp8Linear):
                first.then = second.step
