"""What the network can compute once for all sampling steps, and what one step keeps for the next."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ContextKV:
    """Texts as the cross-attentions take them: `shape` is that of the context, `kv` every layer's projection of it."""

    shape: torch.Size
    kv: dict[nn.Module, Tensor]


@dataclass(frozen=True)
class TimestepEmbedding:
    """A step's timestep and frame rates as the residual blocks add them: each block's projection, (B, 1 or T, C)."""

    blocks: dict[nn.Module, Tensor]


@dataclass(frozen=True)
class TimestepTable:
    """What a network takes as its timestep at every step: `rows` holds one for each step.

    Without blocks a row is timesteps (B, 1); with blocks it is their projections side by side, (B, 1, channels of all).
    """

    rows: Tensor
    blocks: tuple[nn.Module, ...] = ()
    channels: tuple[int, ...] = ()

    def embedding(self, row: Tensor) -> Tensor | TimestepEmbedding:
        """Returns what `forward` takes in the timestep's place: each block its channels of a row, without copies."""
        if not self.blocks:
            return row
        return TimestepEmbedding(dict(zip(self.blocks, row.split(self.channels, dim=-1), strict=True)))


@dataclass
class CachedFeatures:
    """What the last `stages` output blocks take from the ones before: kept by a whole forward, used by one that has it."""

    stages: int
    features: Tensor | None = None


def context_shape(contexts: Sequence[Tensor]) -> torch.Size:
    """Returns the shape of contexts one after another, with a row for each frame where one of them has that."""
    frames = max(context.shape[1] for context in contexts)
    return torch.Size((sum(len(context) for context in contexts), frames, *contexts[0].shape[2:]))
