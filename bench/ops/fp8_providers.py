"""The ops of FP8 layers, each against the definition or the network's own layer, by uses."""

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_engine.kernels.fp8_conv2d import conv_e4m3
from vstar_engine.kernels.fp8_layernorm import norm_e4m3, norm_e4m3_ref
from vstar_engine.kernels.fp8_linear import linear_e4m3
from vstar_engine.kernels.fp8_quantize import to_e4m3, to_e4m3_ref
from vstar_engine.kernels.linear import linear_ref
from vstar_engine.kernels.problems import Fp8ConvProblem, Fp8LinearProblem, LinearProblem

from .op_cases import EPS, ROWS, Call, OpCase, OpSite


def has_e4m3(site: OpSite) -> bool:
    return site.device.type == "cuda" and torch.cuda.get_device_capability(site.device) >= (8, 9)


def roundings(site: OpSite) -> Iterator[OpCase]:
    """Rounding to FP8 of what goes into linear layers: of the network's width, and of the feed-forward's."""
    for name, width in (("projections", site.channels), ("feed-forward", 4 * site.channels)):

        def draw(width: int = width) -> tuple[Tensor, ...]:
            return site.normal(site.rows, width), torch.tensor(2.0**-6, device=site.device)

        moved = site.nbytes(site.rows * width) + site.rows * width
        yield OpCase(name, draw, to_e4m3, to_e4m3_ref, moved, compared=ROWS, serves=has_e4m3)


def small_convolutions(site: OpSite) -> Iterator[OpCase]:
    """Convolutions in FP8, rounding and all, against the network's own, over values that e4m3 holds: both make the same."""
    channels, step, scale = site.channels, *torch.tensor([2.0**-6, 2.0**-8], device=site.device)
    uses = {
        "3x3": ((site.batch * site.frames, site.height, site.across, channels), (3, 3)),
        "over frames": ((site.batch, site.frames, site.cells, channels), (3, 1)),
    }
    for name, (shape, kernel) in uses.items():
        padding = [side // 2 for side in kernel]
        taps = to_e4m3(site.normal(channels, *kernel, channels) * (64 / channels**0.5), torch.ones_like(step))

        def draw(shape: tuple[int, ...] = shape) -> tuple[Tensor, ...]:
            values = to_e4m3(site.normal(*shape), step).to(site.dtype) * step.to(site.dtype)
            return values.movedim(-1, 1), site.normal(channels)

        def ours(x: Tensor, bias: Tensor, taps: Tensor = taps, padding: list[int] = padding) -> Tensor:
            images = to_e4m3(x.movedim(1, -1), step)
            return conv_e4m3(Fp8ConvProblem(images, taps, step, scale, bias, 1, padding)).movedim(-1, 1)

        weight = (taps.to(site.dtype) * scale.to(site.dtype)).movedim(-1, 1)

        def definition(x: Tensor, bias: Tensor, weight: Tensor = weight, padding: list[int] = padding) -> Tensor:
            return F.conv2d(x, weight.to(x.dtype), bias, padding=padding)

        rows, size = math.prod(shape[:-1]), math.prod(kernel) * channels**2
        moved, work = site.nbytes(2 * rows * channels) + 2.0 * rows * channels + size, 2.0 * rows * size
        yield OpCase(name, draw, ours, definition, moved, work, serves=has_e4m3)


def small_norms(site: OpSite) -> Iterator[OpCase]:
    """Yields the norm of what attends and of what is fed forward, rounded to FP8."""
    step = torch.tensor(2.0**-6, device=site.device)

    def draw() -> tuple[Tensor, ...]:
        return (site.normal(site.rows, site.channels), *site.normal(2, site.channels).unbind())

    def call(compute: Call, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        return compute(x, gain, shift, EPS, step)

    # what was rounded in the network's dtype first, or summed in another order, may fall to another of e4m3's numbers
    budget = 1e-3 if site.dtype == torch.float32 else 2e-2
    ours, definition = partial(call, norm_e4m3), partial(call, norm_e4m3_ref)
    moved = site.nbytes(site.rows * site.channels) + site.rows * site.channels
    yield OpCase("transformer", draw, ours, definition, moved, compared=ROWS, serves=has_e4m3, budget=budget)


def small_projections(site: OpSite) -> Iterator[OpCase]:
    """Linear layers in FP8, rounding and all, against the network's own, over values that e4m3 holds: both make the same."""
    width, step, scale = site.channels, *torch.tensor([2.0**-6, 2.0**-8], device=site.device)
    uses = {
        "gate": (width, 8 * width, 4 * width),
        "residual, attention": (width, width, width),
        "residual, feed-forward": (4 * width, width, width),
    }
    for name, (in_features, out, result) in uses.items():
        gate = result < out
        small = to_e4m3(site.normal(out, in_features) * (64 / in_features**0.5), torch.ones_like(step))

        def draw(in_features: int = in_features, out: int = out, gate: bool = gate) -> tuple[Tensor, ...]:
            values = to_e4m3(site.normal(site.rows, in_features), step).to(site.dtype) * step.to(site.dtype)
            return values, site.normal(out), *([] if gate else [site.normal(site.rows, out)])

        def ours(x: Tensor, bias: Tensor, *residual: Tensor, small: Tensor = small, gate: bool = gate) -> Tensor:
            beside = residual[0] if residual else None
            return linear_e4m3(Fp8LinearProblem(x, small, step, scale, bias, beside, gate, None, x.dtype))

        weight = small.to(site.dtype) * scale.to(site.dtype)

        def definition(x: Tensor, bias: Tensor, *residual: Tensor, weight: Tensor = weight, gate: bool = gate) -> Tensor:
            return linear_ref(LinearProblem(x, weight.to(x.dtype), bias, residual[0] if residual else None, gate))

        moved = site.nbytes(site.rows * (in_features + result * (1 if gate else 2))) + out * in_features
        items, work = (0,) if gate else (0, 2), 2.0 * site.rows * in_features * out
        yield OpCase(name, draw, ours, definition, moved, work, items, ROWS, serves=has_e4m3)
