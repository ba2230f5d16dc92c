"""Samples a video in overlapping chunks, each from the last frames of the one before. StreamingT2V, arXiv 2403.14773."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from vstar_engine.config.models import NoiseSpec, Spec
from vstar_engine.config.request import Request
from vstar_engine.config.sampling import TRAINING_STEPS, Sampling
from vstar_engine.networks.appearance import Resampler, with_image
from vstar_engine.networks.image_encoder import ImageTower
from vstar_engine.networks.streaming_unet import ChunkDenoiser

from .batch import Batch, BatchRow
from .schedule import Schedule


def leading_timesteps(steps: int) -> np.ndarray:
    """Returns ascending timesteps 1, 1 + s, 1 + 2 s, ... with the whole stride s = 1000 // steps."""
    if not 1 <= steps < TRAINING_STEPS:
        raise ValueError(f"a streaming model takes 1 to {TRAINING_STEPS - 1} steps, got {steps}")
    return np.arange(steps) * (TRAINING_STEPS // steps) + 1


def schedule_of(sampling: Sampling) -> Schedule:
    """Builds the schedule of a chunk: DDIM without the dynamic rescale, which this model was not trained with."""
    if sampling.walk:
        raise ValueError(f"a streaming model samples without {', '.join(sampling.walk)}; leave it out of --fast")
    return Schedule.ddim(timesteps=leading_timesteps(sampling.steps), eta=sampling.eta, noise=NoiseSpec(rescale=False))


@dataclass(frozen=True)
class Anchor:
    """The image tokens of a video's first frame and of a grey image, for the two branches of guidance: (1, tokens, C)."""

    cond: Tensor
    uncond: Tensor

    @staticmethod
    def of(image: Tensor, tower: ImageTower, resampler: Resampler) -> "Anchor":
        """Encodes an image (1, 3, H, W) in [-1, 1]."""
        embeddings = tower.embed(torch.cat([image, torch.zeros_like(image)]))
        cond, uncond = resampler(embeddings[:, None]).split(1)
        return Anchor(cond, uncond)


@dataclass(frozen=True)
class ChunkNoise:
    """The noise of a chunk in latents' layout (1, C, T, h, w): its first latents, and that of a step by its index."""

    latents: Tensor
    step: Callable[[int], Tensor]

    @classmethod
    def drawn(cls, spec: Spec, size: tuple[int, int], frames: int, generator: torch.Generator) -> Self:
        """Draws from a generator of the CPU, which goes on from chunk to chunk; a step's noise is drawn frame by frame."""
        channels, cells = spec.unet.in_channels, [side // spec.vae.factor for side in size]
        latents = torch.randn(1, channels, frames, *cells, generator=generator)
        return cls(latents, lambda index: as_clip(torch.randn(frames, channels, *cells, generator=generator)))


def as_clip(frames: Tensor) -> Tensor:
    """(T, C, h, w) -> (1, C, T, h, w)."""
    return frames.transpose(0, 1)[None]


def chunk_batch(
    denoiser: ChunkDenoiser,
    spec: Spec,
    dtype: torch.dtype,
    request: Request,
    texts: tuple[Tensor, Tensor],
    anchor: Anchor,
    noise: ChunkNoise,
) -> Batch:
    """Returns the batch of one chunk, whose latents are those of its only row when its steps are done.

    `request` is the chunk's, with its frames and size; `texts` are the conditional and the unconditional text embeddings of its
    frames, (1, 1 or T, 77, C) each.
    """
    cond, uncond = with_image(texts[0], anchor.cond), with_image(texts[1], anchor.uncond)
    row = BatchRow(
        noise.latents.to(cond.device),
        schedule_of(request.sampling),
        request.sampling.guidance,
        noise.step,
        index=0,
        request=request,
        held=None,
        context=cond,
        uncond_context=uncond,
    )
    return Batch(denoiser, spec, dtype, [row])
