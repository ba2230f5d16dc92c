"""One sampling step of a batch as a function of tensors: the network, guidance and the update, nothing of it on the host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vstar_engine.kernels.guided_step import guided_step
from vstar_engine.networks.layers import Deep, Heard
from vstar_engine.networks.unet import Clock, UNet, heard_shape


class Given(NamedTuple):
    """What differs from step to step, a row a video, all on the device.

    `told` is a row of the network's `Clock`, (B, 1, channels), or timesteps (B, 1); the rest is what `UNet.forward` and
    `guided_step` take.
    """

    latents: Tensor
    told: Tensor
    fps: Tensor
    tar: Tensor
    coefficients: Tensor
    noise: Tensor
    plain: Tensor


@dataclass(eq=False)
class Texts:
    """What is heard in a call of the network, (1, 1 or T, L, C) each: made ready once, since they are heard in every step."""

    contexts: tuple[Tensor, ...]
    ready: Heard | Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return heard_shape(self.contexts)

    def as_heard(self, denoiser: Callable[..., Tensor]) -> Any:
        """Returns them as a denoiser takes them."""
        if self.ready is None:
            if isinstance(denoiser, UNet):
                self.ready = denoiser.hear(*self.contexts)
            else:
                frames = self.shape[1]
                self.ready = torch.cat([context.expand(-1, frames, -1, -1) for context in self.contexts])
        return self.ready


@dataclass(frozen=True)
class Call:
    """A call of the network in a step: the videos whose latents it takes, what is heard, and deep features, if any are kept."""

    rows: tuple[int, ...]
    texts: Texts
    deep: Deep | None = None


@dataclass(frozen=True)
class Step:
    """A step to take; the predictions of its calls, one after another, are what `Given.plain` counts."""

    dtype: torch.dtype
    clock: Clock | None
    calls: tuple[Call, ...]
    given: Given


def take(denoiser: Callable[..., Tensor], step: Step) -> tuple[Tensor, ...]:
    """Returns the next latents, what they are on the way to, and the deep features of each call that shall keep some."""
    latents, eps, kept = step.given.latents.to(step.dtype), [], []
    for call in step.calls:
        x, told, fps, tar = (of(value, call.rows) for value in (latents, *step.given[1:4]))
        timed: Any = told if step.clock is None else step.clock.timed(told)
        given = (x, timed, call.texts.as_heard(denoiser), fps, tar)
        if call.deep is None:
            eps.append(denoiser(*given))
            continue
        assert isinstance(denoiser, UNet)
        deep = Deep(call.deep.stages, call.deep.features)
        eps.append(denoiser(*given, deep))
        if call.deep.features is None:
            assert deep.features is not None
            kept.append(deep.features)
    predicted = torch.cat(eps) if len(eps) > 1 else eps[0]
    latents, coefficients, noise, plain = step.given.latents, *step.given[4:]
    return *guided_step(latents, predicted, plain, coefficients, noise), *kept


def of(value: Tensor, rows: Sequence[int]) -> Tensor:
    """Returns some rows of a tensor, itself where these are all; by slices, since a list of places would come from the host."""
    return value if tuple(rows) == tuple(range(len(value))) else torch.cat([value[i : i + 1] for i in rows])
