"""Motion-aware warp error: what warping a frame by optical flow misses of the next, over the motion (arXiv 2403.14773)."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# of the paper, so that the values compare with published ones
COEFFICIENT = 9.5


@dataclass(frozen=True)
class Mawe:
    """The squared error and the mean flow length of each pair of neighbours, on the 0-255 scale and in pixels."""

    errors: np.ndarray
    motions: np.ndarray

    @property
    def mean_of_ratios(self) -> float:
        """Returns the mean over pairs of error / (9.5 motion), as the published script; pairs without motion are left out."""
        moving = self.motions > 0
        return float((self.errors[moving] / (COEFFICIENT * self.motions[moving])).mean()) if moving.any() else float("nan")

    @property
    def ratio_of_means(self) -> float:
        """Returns mean error / (9.5 mean motion), the paper's form; NaN for a video without motion."""
        motion = self.motions.mean()
        return float(self.errors.mean() / (COEFFICIENT * motion)) if motion > 0 else float("nan")


def mawe(frames: np.ndarray, flows: Iterable[np.ndarray]) -> Mawe:
    """Measures (T, H, W, 3) uint8 frames by the flow from each to the next, (2, H, W) each, x before y."""
    errors, motions = [], []
    for before, after, flow in zip(frames[:-1], frames[1:], flows, strict=True):
        warped, filled = splat(before, flow)
        missed = (after[filled].astype(np.float64) - warped[filled]) ** 2
        errors.append(missed.mean() if filled.any() else 0.0)
        motions.append(np.sqrt((flow.astype(np.float64) ** 2).sum(0)).mean())
    return Mawe(np.array(errors), np.array(motions))


def splat(frame: np.ndarray, flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moves each pixel of (H, W, 3) along a flow (2, H, W) to the nearest pixel, halves to the even one.

    Of pixels that meet the last in raster order stays; those that leave the frame are dropped. Returns the moved frame,
    zero where nothing came, and the mask (H, W) of pixels where something did.
    """
    height, width, channels = frame.shape
    rows, columns = np.mgrid[:height, :width]
    # in float32, as published: a sum that rounds to a half is a tie
    x, y = (
        np.rint(np.float32(place) + np.float32(part)).astype(np.int64).ravel()
        for place, part in zip((columns, rows), flow, strict=True)
    )
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    target, source = (y * width + x)[inside], np.flatnonzero(inside)
    last = np.full(height * width, -1)
    np.maximum.at(last, target, source)
    filled = last >= 0
    moved = np.zeros((height * width, channels), frame.dtype)
    moved[filled] = frame.reshape(-1, channels)[last[filled]]
    return moved.reshape(frame.shape), filled.reshape(height, width)
