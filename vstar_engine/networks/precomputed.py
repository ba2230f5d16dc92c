"""Values that the network computes once for all sampling steps, and features that one step keeps for the next."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ContextKV:
    """The K and V of a context: `shape` is the context's, `kv` holds each cross-attention's projection of it."""

    shape: torch.Size
    kv: dict[nn.Module, Tensor]


@dataclass(frozen=True)
class TimestepEmbedding:
    """The embedding of a step's timestep and frame rates, projected by each residual block: (B, 1 or T, C) each."""

    blocks: dict[nn.Module, Tensor]


@dataclass(frozen=True)
class TimestepTable:
    """The timesteps of all steps in the form that the network takes, one row for each step.

    Without blocks a row holds timesteps (B, 1). With blocks it holds their projections side by side, (B, 1, all channels).
    """

    rows: Tensor
    blocks: tuple[nn.Module, ...] = ()
    channels: tuple[int, ...] = ()

    def embedding(self, row: Tensor) -> Tensor | TimestepEmbedding:
        """Returns a row as `forward` takes it for `timestep`; each block's channels are a view."""
        if not self.blocks:
            return row
        return TimestepEmbedding(dict(zip(self.blocks, row.split(self.channels, dim=-1), strict=True)))


@dataclass
class CachedFeatures:
    """The input of the last `stages` output blocks: stored by a full forward, reused by a forward that is given it."""

    stages: int
    features: Tensor | None = None


def check_rows(videos: int, texts: int) -> None:
    """Raises ValueError unless a context has the same number of texts for every video."""
    if texts % videos:
        raise ValueError(f"context must have as many rows as latents, {videos}, or a multiple, got {texts}")


def context_shape(contexts: Sequence[Tensor]) -> torch.Size:
    """Returns the shape of several contexts concatenated; frames are expanded where any of them has a row for each frame."""
    frames = max(context.shape[1] for context in contexts)
    return torch.Size((sum(len(context) for context in contexts), frames, *contexts[0].shape[2:]))
