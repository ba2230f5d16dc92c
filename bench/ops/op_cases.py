"""What one use of an op is to its benchmark, and where in a network it stands."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vstar_engine.config.models import Spec
from vstar_engine.networks.vae import CHUNK

# rows of a projection that are compared
ROWS = 2048
EPS = 1e-5
Call = Callable[..., Tensor]


@dataclass(frozen=True)
class OpCase:
    """One use of an op: what draws its arguments, who computes it, and the least bytes and FLOPs it takes.

    Answers are held to float64 at `compared` items, from the first to the last of those arguments whose places `items` gives.
    `others` are further ways, by name; `serves` says where ours is used. `budget` is its own where ERROR_BUDGET is less.
    """

    name: str
    draw: Callable[[], tuple[Tensor, ...]]
    ours: Call
    definition: Call
    bytes: float
    flops: float | None = None
    items: tuple[int, ...] = (0,)
    compared: int = 2
    others: dict[str, Call] = field(default_factory=dict)
    serves: Callable[["OpSite"], bool] = lambda site: True
    budget: float = 0.0


@dataclass(frozen=True)
class OpSite:
    """Where in a network an op stands: `batch` clips of `frames` frames of height x across cells of `channels` channels.

    `decoded` is the (N, H, W, C) that the autoencoder has at the level of the same number, None where it has no such level.
    """

    batch: int
    frames: int
    height: int
    across: int
    channels: int
    heads: int
    groups: int
    text: int
    dtype: torch.dtype
    device: torch.device
    decoded: tuple[int, ...] | None = None
    vae_groups: int = 1

    @staticmethod
    def at(
        spec: Spec, size: tuple[int, ...], level: int, frames: int, batch: int, dtype: torch.dtype, device: torch.device
    ) -> "OpSite":
        """Reads a level of a model's UNet, and of its autoencoder."""
        unet = spec.unet
        if level >= unet.levels:
            raise ValueError(f"model {spec.name} has levels 0 to {unet.levels - 1}, got {level}")
        height, across = (side // spec.vae.factor >> level for side in size)
        channels = unet.model_channels * unet.channel_mult[level]
        heads, text = channels // unet.head_dim, spec.text.context_length
        here = (batch, frames, height, across, channels, heads, unet.norm_groups, text, dtype, device)
        if level >= len(spec.vae.channel_mult):
            return OpSite(*here)
        decoded = (min(CHUNK, frames), *(side >> level for side in size), spec.vae.channels * spec.vae.channel_mult[level])
        return OpSite(*here, decoded, spec.vae.norm_groups)

    @property
    def cells(self) -> int:
        return self.height * self.across

    @property
    def rows(self) -> int:
        return self.batch * self.frames * self.cells

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def weight(self, out_features: int, in_features: int) -> Tensor:
        return (torch.randn(out_features, in_features, device=self.device) * in_features**-0.5).to(self.dtype)

    def nbytes(self, *numbers: int) -> float:
        return float(sum(numbers) * self.dtype.itemsize)
