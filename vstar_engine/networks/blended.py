"""Randomized blending: a network that sees windows of a clip, where overlaps are cut anew in every call.

StreamingT2V, arXiv 2403.14773, with windows that cover every frame.
"""

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from .denoiser import Denoiser
from .precomputed import TimestepTable


def window_starts(frames: int, window: int, overlap: int) -> list[int]:
    """Returns the first frame of each window; where they do not tile, the last window is moved back to end with the clip.

    Raises ValueError for an overlap that leaves no new frames.
    """
    if not (window >= 1 and 0 <= overlap < window):
        raise ValueError(f"a window has at least 1 frame and an overlap smaller than it, got {window} and {overlap}")
    if frames <= window:
        return [0]
    starts = list(range(0, frames - window + 1, window - overlap))
    return starts if starts[-1] == frames - window else [*starts, frames - window]


def cut_frames(starts: list[int], window: int, draw: random.Random) -> list[int]:
    """Draws the frame from which on each window is seen: uniformly within what it shares with the one before."""
    return [0, *(start + draw.randrange(max(1, before + window - start)) for before, start in pairwise(starts))]


@dataclass
class BlendedDenoiser(Denoiser):
    """A denoiser of clips longer than `window` frames. Prediction is the network's in each window, cut at random.

    `draw` is the generator of the cuts, in the order of calls and windows.
    """

    denoiser: Denoiser
    window: int
    overlap: int
    draw: random.Random

    def __call__(self, latents: Tensor, timestep: Tensor, context: Tensor, fps: Tensor, tar: Tensor) -> Tensor:
        frames = latents.shape[2]
        starts = window_starts(frames, self.window, self.overlap)
        cuts, width = cut_frames(starts, self.window, self.draw), min(self.window, frames)
        out = latents.new_empty(context.shape[0], *latents.shape[1:])
        for start, cut in zip(starts, cuts, strict=True):
            here = slice(start, start + width)
            heard: Any = self.denoiser.prepare_context(context if context.shape[1] == 1 else context[:, here])
            eps = self.denoiser(latents[:, :, here].contiguous(), timestep, heard, fps, tar[..., :width])
            out[:, :, cut : start + width] = eps[:, :, cut - start :]
        return out

    @property
    def module(self) -> nn.Module | None:
        return self.denoiser.module

    def timestep_table(self, timesteps: Tensor, fps: Tensor) -> TimestepTable:
        return self.denoiser.timestep_table(timesteps, fps)

    def graph_bytes(self) -> int:
        return self.denoiser.graph_bytes()

    def forget_graphs(self) -> bool:
        return self.denoiser.forget_graphs()
