"""The networks that an exporter traces: UNet, decoder and text tower without data, with their dynamic axes."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from vstar_engine.artifacts.built_engine import MAX_BATCH
from vstar_engine.config.models import MAX_SIDE, Spec, TextSpec, UNetSpec, VaeSpec
from vstar_engine.config.request import MAX_FRAMES
from vstar_engine.networks.blocks import TemporalBlock
from vstar_engine.networks.conditional_attention import FeatureFuser
from vstar_engine.networks.layers import FrameConv, Pointwise
from vstar_engine.networks.streaming_unet import StreamingUNet, streaming_of
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.networks.unet import UNet
from vstar_engine.networks.vae import Vae
from vstar_engine.weights import key_map


class FrameDecoder(Vae):
    """The autoencoder's decoder from scaled latents of single frames to pixels."""

    def __init__(self, spec: VaeSpec):
        super().__init__(spec, encoder=False)

    def forward(self, latents: Tensor) -> Tensor:
        """(frames, 4, h, w) -> (frames, 3, factor*h, factor*w) in about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents / self.spec.scale_factor))


@dataclass(frozen=True)
class Network:
    """A network to trace: a module without data, example inputs, their dynamic axes, and its output's name and axes.

    `prefix` is that of its official names; `attentions` counts its temporal attentions.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    dims: dict[str, dict[int, Any]]
    output: str
    axes: tuple[int | str, ...]
    prefix: str
    attentions: int = 0

    def shapes(self) -> dict[str, list[int | str]]:
        """Writes the inputs' shapes with dynamic axes by name; rows and columns count units that every level can halve."""
        units = {"rows": "height", "columns": "width"}
        written: dict[str, list[int | str]] = {}
        for name, tensor in self.inputs.items():
            named = {axis: dim.__name__.split("*")[-1] for axis, dim in self.dims[name].items()}
            written[name] = [units.get(named[i], named[i]) if i in named else size for i, size in enumerate(tensor.shape)]
        return written

    def described(self) -> dict[str, Any]:
        """Returns names, types and axes of the inputs and of the output, for a manifest."""
        dtype = next(self.module.parameters()).dtype
        inputs = [
            {"name": name, "dtype": str(tensor.dtype)[6:], "shape": shape}
            for (name, tensor), shape in zip(self.inputs.items(), self.shapes().values(), strict=True)
        ]
        return {"inputs": inputs, "outputs": [{"name": self.output, "dtype": str(dtype)[6:], "shape": list(self.axes)}]}

    def on(self, module: nn.Module, device: torch.device) -> "Network":
        """Returns the same with another module, whose inputs lie where it does."""
        inputs = {name: torch.zeros_like(value, device=device) for name, value in self.inputs.items()}
        return replace(self, module=module, inputs=inputs)


def on_meta(kind: type[nn.Module], spec: Any, dtype: torch.dtype) -> nn.Module:
    """Builds a network without data; weights that are stored with trailing ones lose them, so that no reshape is traced."""
    with torch.device("meta"):
        module = kind(spec).to(dtype).eval().requires_grad_(False)
    for part in module.modules():
        if isinstance(part, Pointwise | FrameConv):
            part.weight = nn.Parameter(part.weight.flatten(1 if isinstance(part, Pointwise) else 3), requires_grad=False)
    return module


def _dim(name: str, most: int) -> Any:
    return Dim(name, min=1, max=most)


def unet(spec: UNetSpec, dtype: torch.dtype, size: tuple[int, int] | None = None) -> Network:
    """Describes the UNet; `size` is (height, width) in latent cells, None for any."""
    module, unit = on_meta(UNet, spec, dtype), 2 ** (spec.levels - 1)
    height, width = size or (2 * unit, 3 * unit)
    batch, frames = 2, 5
    with torch.device("meta"):
        inputs = {
            "latents": torch.empty(batch, spec.in_channels, frames, height, width, dtype=dtype),
            "timestep": torch.empty(batch, frames, dtype=torch.int64),
            "context": torch.empty(batch, frames, TextSpec.context_length, spec.context_dim, dtype=dtype),
            "fps": torch.empty(batch, dtype=torch.int64),
            "tar": torch.empty(batch, spec.levels, frames, dtype=torch.float32),
        }
    b, t = _dim("batch", MAX_BATCH), _dim("frames", MAX_FRAMES)
    most = MAX_SIDE // (8 * unit)
    clip = {0: b, 2: t} if size else {0: b, 2: t, 3: unit * _dim("rows", most), 4: unit * _dim("columns", most)}
    dims = {"latents": clip, "timestep": {0: b, 1: t}, "context": {0: b, 1: t}, "fps": {0: b}, "tar": {0: b, 2: t}}
    axes = ("batch", spec.out_channels, "frames", *(size or ("height", "width")))
    attentions = 2 * sum(isinstance(part, TemporalBlock) for part in module.modules())
    return Network(module, inputs, dims, "eps", axes, key_map.UNET, attentions)


class StreamingStep(StreamingUNet):
    """A streaming model's network, both of its halves in one graph; its inputs share their batch axis.

    The pixel encoder runs once a chunk and is no part of it.
    """

    def __init__(self, spec: Spec):
        super().__init__(spec)
        del self.cam.pixel_encoder
        self.unused = ("cam.pixel_encoder.",)

    def forward(  # type: ignore[override]
        self, latents: Tensor, timestep: Tensor, context: Tensor, tar: Tensor, features: Tensor
    ) -> Tensor:
        """As `StreamingUNet.forward`, with features (B, overlap, C, H, W) and no frame rate, which it is not told."""
        # without these checks every input has a batch symbol of its own, and tracing does not end
        for other in (timestep, context, tar, features):
            torch._check(other.shape[0] == latents.shape[0])
        return super().forward(latents, timestep, context, timestep[:, 0], tar, features.flatten(0, 1))


def streaming_step(spec: Spec, dtype: torch.dtype, size: tuple[int, int] | None = None) -> Network:
    """Describes a streaming model's network for a chunk; `size` is (height, width) in latent cells, None for any."""
    streaming, unit = streaming_of(spec), 2 ** (spec.unet.levels - 1)
    module = on_meta(StreamingStep, spec, dtype)
    height, width = size or (2 * unit, 3 * unit)
    batch, frames, overlap = 2, streaming.chunk, streaming.overlap
    tokens = spec.text.context_length + spec.unet.image_tokens
    with torch.device("meta"):
        inputs = {
            "latents": torch.empty(batch, spec.unet.in_channels, frames, height, width, dtype=dtype),
            "timestep": torch.empty(batch, frames, dtype=torch.int64),
            "context": torch.empty(batch, frames, tokens, spec.unet.context_dim, dtype=dtype),
            "tar": torch.empty(batch, spec.unet.levels, frames, dtype=torch.float32),
            "features": torch.empty(batch, overlap, spec.unet.model_channels, height, width, dtype=dtype),
        }
    b, most = _dim("batch", MAX_BATCH), MAX_SIDE // (8 * unit)
    sides = {} if size else {3: unit * _dim("rows", most), 4: unit * _dim("columns", most)}
    dims = {name: {0: b, **(sides if name in ("latents", "features") else {})} for name in inputs}
    axes = ("batch", spec.unet.out_channels, frames, *(size or ("height", "width")))
    attentions = sum(2 * isinstance(part, TemporalBlock) + isinstance(part, FeatureFuser) for part in module.modules())
    return Network(module, inputs, dims, "eps", axes, key_map.UNET, attentions)


def decoder(spec: VaeSpec, dtype: torch.dtype) -> Network:
    """Describes the autoencoder's decoder: latents (frames, 4, height, width) -> pixels (frames, 3, 8 height, 8 width)."""
    inputs = {"latents": torch.empty(3, spec.z_channels, 6, 10, dtype=dtype, device="meta")}
    most = MAX_SIDE // spec.factor
    dims = {"latents": {0: _dim("frames", MAX_FRAMES), 2: _dim("height", most), 3: _dim("width", most)}}
    axes = ("frames", spec.out_channels, "pixel_height", "pixel_width")
    return Network(on_meta(FrameDecoder, spec, dtype), inputs, dims, "pixels", axes, key_map.VAE)


def text(spec: TextSpec, dtype: torch.dtype) -> Network:
    """Describes the text tower: tokens (prompts, 77) int64 -> context (prompts, 77, C)."""
    inputs = {"tokens": torch.empty(3, spec.context_length, dtype=torch.int64, device="meta")}
    dims = {"tokens": {0: _dim("prompts", MAX_FRAMES)}}
    axes = ("prompts", spec.context_length, spec.width)
    return Network(on_meta(TextTower, spec, dtype), inputs, dims, "context", axes, key_map.TEXT)
