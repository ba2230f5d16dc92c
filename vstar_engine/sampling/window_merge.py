"""Merges predictions of overlapping windows into one of the whole clip: by random cuts, by weights, or the later window wins.

At fixed latents the clean latents, the noise and the next latents are affine in each other with numbers that all windows
share, and one noise serves the whole clip. So merging any of them merges the others; the noise is merged here.
"""

import numpy as np
import torch
from torch import Tensor

from vstar_engine.config.windows import AVERAGE, NONE, PAPER, RANDOMIZED, WindowPlan

# the counter's second word where a window's number stands otherwise
PHASE = 2**32 - 1


def drawn(seed: int, step: int, window: int, choices: int) -> int:
    """Returns a number from 0 to choices - 1 that depends on nothing but the seed, the step and the window."""
    (word,) = np.random.Philox(key=seed, counter=[step, window, 0, 0]).random_raw(1)
    return int(word) * choices >> 64


def cut(blend: str, overlap: int, seed: int, step: int, window: int) -> int:
    """Returns how many of a window's frames, of the `overlap` that it shares, stay those of the window before."""
    if blend == RANDOMIZED:
        return drawn(seed, step, window, overlap) if overlap else 0
    return drawn(seed, step, window, overlap + 1) if blend == PAPER else 0


def earlier_probability(blend: str, overlap: int) -> np.ndarray:
    """Returns the probability that each shared frame shows the window before, (overlap,) float64, by RANDOMIZED or PAPER.

    The code draws a cut from 0 to O-1, so frame j has (O-1-j) / O. The paper has 1 - (j+1) / (O+1): a cut from 0 to O.
    """
    choices = {RANDOMIZED: overlap, PAPER: overlap + 1}[blend]
    return np.array([sum(c > j for c in range(choices)) / choices for j in range(overlap)])


def starts(plan: WindowPlan, seed: int, step: int) -> list[int]:
    """Returns the first frame of each window in a step."""
    most = plan.most_shift
    return plan.shifted(drawn(seed, step, PHASE, 2 * most + 1) - most) if plan.phase else plan.starts


class WindowMerge:
    """Collects windows (B, C, W, h, w) of a clip of `frames`, in the order of their starts; `result` is the clip's."""

    def __init__(self, frames: int, blend: str):
        self.frames, self.blend = frames, blend
        self.whole: Tensor | None = None
        self.weight: Tensor | None = None

    def add(self, start: int, part: Tensor, cut: int = 0) -> None:
        """Adds a window from frame `start`; its first `cut` frames leave what the window before has there."""
        length = part.shape[2]
        if self.whole is None:
            self.whole = part.new_zeros(*part.shape[:2], self.frames, *part.shape[3:])
            self.weight = part.new_zeros(self.frames, 1, 1)
        assert self.weight is not None
        if self.blend == AVERAGE:
            place = torch.arange(1, length + 1, device=part.device, dtype=part.dtype)
            rising = torch.minimum(place, place.flip(0))[:, None, None]
            self.whole[:, :, start : start + length] += rising * part
            self.weight[start : start + length] += rising
        else:
            self.whole[:, :, start + cut : start + length] = part[:, :, cut:]

    def result(self) -> Tensor:
        """Returns the merged clip, (B, C, frames, h, w)."""
        assert self.whole is not None
        assert self.weight is not None
        return self.whole / self.weight if self.blend == AVERAGE else self.whole


def cuts(plan: WindowPlan, starts: list[int], seed: int, step: int) -> list[int]:
    """Returns the cut of each window of a step; the first window has none."""
    found = [0]
    for window in range(1, len(starts)):
        shared = starts[window - 1] + plan.window - starts[window]
        found.append(0 if plan.blend == NONE else cut(plan.blend, shared, seed, step, window))
    return found
