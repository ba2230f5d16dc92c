"""One sampling step of a batch as data: what the network is called with, and what guidance and the update take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .precomputed import CachedFeatures, ContextKV, TimestepTable, context_shape


class StepInputs(NamedTuple):
    """What differs from step to step, a row a video, all on the device.

    `timestep_embedding` is a row of the network's `TimestepTable`; the rest is what `UNet.forward` and `guided_step` take.
    """

    latents: Tensor
    timestep_embedding: Tensor
    fps: Tensor
    tar: Tensor
    coefficients: Tensor
    noise: Tensor
    plain: Tensor


@dataclass(eq=False)
class Conditioning:
    """What is heard in a call of the network, (1, 1 or T, L, C) each: made ready once, since they are heard in every step."""

    contexts: tuple[Tensor, ...]
    ready: ContextKV | Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return context_shape(self.contexts)

    def prepared(self, prepare: Callable[..., ContextKV | Tensor]) -> Any:
        """Returns what a network's `prepare_context` makes of them, made at the first call."""
        if self.ready is None:
            self.ready = prepare(*self.contexts)
        return self.ready


@dataclass(frozen=True)
class NetworkCall:
    """A call of the network in a step: the videos whose latents it takes, what is heard, and deep features, if any are kept."""

    rows: tuple[int, ...]
    conditioning: Conditioning
    cached: CachedFeatures | None = None

    def of(self, value: Tensor) -> Tensor:
        """Returns the call's rows of a tensor."""
        return rows_of(value, self.rows)


@dataclass(frozen=True)
class SamplingStep:
    """A step to take; the predictions of its calls, one after another, are what `StepInputs.plain` counts."""

    dtype: torch.dtype
    timesteps: TimestepTable
    calls: tuple[NetworkCall, ...]
    inputs: StepInputs


def rows_of(value: Tensor, rows: Sequence[int]) -> Tensor:
    """Returns some rows of a tensor, itself where these are all; by slices, since a list of places would come from the host."""
    return value if tuple(rows) == tuple(range(len(value))) else torch.cat([value[i : i + 1] for i in rows])
