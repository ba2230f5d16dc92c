"""Networks of full size and one sampling step's inputs, made from seeds on the device: speed needs no trained weights."""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from vstar_engine.config.models import Spec, UNetSpec
from vstar_engine.config.sampling import TAR_PRESETS, Sampling
from vstar_engine.networks.unet import UNet
from vstar_engine.sampling.tar import table
from vstar_engine.weights.checkpoint import memory_format

GUIDANCE_BRANCHES = 2
Network = TypeVar("Network", bound=nn.Module)
LAYOUTS = ("channels_last", "contiguous")


def fill(module: nn.Module, seed: int = 0) -> None:
    """Draws weights where they lie: normals of variance 1 / fan-in, norms 1, biases 0."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, math.prod(parameter.shape[1:]) ** -0.5, generator=generator)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def seeded(make: Callable[[], Network], device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Network:
    """Builds a network on `device`, without ever holding it elsewhere, and fills it."""
    with torch.device("meta"):
        module = make()
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    fill(module, seed)
    return module


def seeded_unet(spec: UNetSpec, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> UNet:
    return seeded(lambda: UNet(spec), device, dtype, seed)


def lay_out(unet: Network, layout: str) -> Network:
    """Puts the convolutions' weights into one of LAYOUTS, which the hidden states follow: channels-last as loading does."""
    for parameter in unet.parameters():
        wanted = memory_format(parameter.dim()) if layout == "channels_last" else torch.contiguous_format
        parameter.data = torch.empty_like(parameter.data, memory_format=wanted).copy_(parameter.data)
    return unet


def step_inputs(spec: Spec, size: tuple[int, ...], frames: int, device: torch.device | str, dtype: torch.dtype) -> list[Tensor]:
    """Makes what one sampling step gives the UNet: one video, two texts (both guidance branches), one a frame, default TAR."""
    generator = torch.Generator(device).manual_seed(frames)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    height, width = (side // spec.vae.factor for side in size)
    latents = normal(1, spec.unet.in_channels, frames, height, width)
    context = normal(GUIDANCE_BRANCHES, frames, spec.text.context_length, spec.unet.context_dim)
    timestep = torch.full((1, 1), 481, device=device)
    fps = torch.full((1,), Sampling.fps_condition, device=device)
    tar = table(TAR_PRESETS["64D1_32D8"], spec.unet.levels, frames, step=0).to(device)
    return [latents, timestep, context, fps, tar]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Returns ||got - wanted|| / ||wanted||, in `wanted`'s dtype; not a number where `got` is none."""
    return float(torch.linalg.vector_norm(got.to(wanted.dtype) - wanted) / torch.linalg.vector_norm(wanted))
