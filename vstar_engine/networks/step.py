"""One sampling step of a batch as data: the calls of the network, and the inputs of guidance and the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .precomputed import CachedFeatures, ContextKV, TimestepTable, context_shape

# parts done and all parts of a step
OnPart = Callable[[int, int], None]


class StepInputs(NamedTuple):
    """The tensors that differ from step to step, a row for each video, all on the device.

    `timestep_embedding` is a row of the network's `TimestepTable`. The rest are arguments of `UNet.forward` and `guided_step`;
    `history` is None where no video's sampler reads earlier predictions.
    """

    latents: Tensor
    timestep_embedding: Tensor
    fps: Tensor
    tar: Tensor
    coefficients: Tensor
    noise: Tensor
    plain: Tensor
    history: Tensor | None = None


@dataclass(eq=False)
class Conditioning:
    """The text embeddings of one call of the network, (1, 1 or T, L, C) each, and the form prepared from them for all steps.

    In a step of windows they may be what a window's embeddings are made of.
    """

    contexts: tuple[Any, ...]
    ready: ContextKV | Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return context_shape(self.contexts)

    def prepared(self, prepare: Callable[..., ContextKV | Tensor]) -> Any:
        """Returns the result of a network's `prepare_context`, computed at the first call."""
        if self.ready is None:
            self.ready = prepare(*self.contexts)
        return self.ready


@dataclass(frozen=True)
class NetworkCall:
    """One call of the network in a step: the videos whose latents it takes, their texts, and cached features if any."""

    rows: tuple[int, ...]
    conditioning: Conditioning
    cached: CachedFeatures | None = None

    def of(self, value: Tensor) -> Tensor:
        """Returns the call's rows of a tensor."""
        return rows_of(value, self.rows)


@dataclass(frozen=True)
class SamplingStep:
    """One step of a batch. `StepInputs.plain` indexes the predictions of its calls, concatenated.

    `index` counts steps from 0 and `seeds` has the seed of each video, for choices that are drawn for a step. `on_part` gets
    (parts done, all parts) of a step that is computed in parts.
    """

    dtype: torch.dtype
    timesteps: TimestepTable
    calls: tuple[NetworkCall, ...]
    inputs: StepInputs
    index: int = 0
    seeds: tuple[int, ...] = ()
    on_part: OnPart | None = None


def rows_of(value: Tensor, rows: Sequence[int]) -> Tensor:
    """Returns some rows of a tensor, or the tensor itself where these are all of them."""
    # by slices: a list of indices would be copied from the host
    return value if tuple(rows) == tuple(range(len(value))) else torch.cat([value[i : i + 1] for i in rows])
