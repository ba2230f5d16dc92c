"""The noise that a video starts from: independent frames, FreeNoise's shuffled repeats, or frames with a part in common."""

import torch
from torch import Generator, Tensor

from vstar_engine.config.request import Clip
from vstar_engine.config.windows import SHARED, SHUFFLED


def initial_noise(clip: Clip, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draws the initial latents (1, C, T, h, w) float32 of a clip, of unit variance each."""
    if clip.noise == SHUFFLED and clip.plan is not None:
        return shuffled(shape, clip.plan.window, clip.plan.window - clip.plan.overlap, generator)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    if clip.noise == SHARED:
        common = torch.randn(*shape[:2], 1, *shape[3:], generator=generator, dtype=torch.float32)
        return clip.noise_share**0.5 * common + (1 - clip.noise_share) ** 0.5 * noise
    return noise


def shuffled(shape: tuple[int, ...], window: int, unit: int, generator: Generator) -> Tensor:
    """Draws noise for `window` frames and repeats it, each run of `unit` frames in an order of its own (arXiv 2310.15169)."""
    noise = torch.empty(shape, dtype=torch.float32)
    first = noise[:, :, :window]
    first.copy_(torch.randn(first.shape, generator=generator, dtype=torch.float32))
    for start in range(window, shape[2], unit):
        length = min(unit, shape[2] - start)
        order = torch.randperm(length, generator=generator)
        noise[:, :, start : start + length] = noise[:, :, start - window + order]
    return noise
