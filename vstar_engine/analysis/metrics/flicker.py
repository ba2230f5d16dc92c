"""Flicker: change that the next frame takes back."""

import numpy as np

from vstar_engine.analysis.similarity import pixels


def flicker(frames: np.ndarray) -> float:
    """Returns how far frames lie from the middle of their neighbours, as a mean share of full scale; 0 for steady change.

    frames (T, H, W, 3) uint8 of at least 3 frames, else ValueError. Means of 8x8 pixels are compared, so noise is averaged out.
    """
    if len(frames) < 3:
        raise ValueError(f"flicker needs at least 3 frames, got {len(frames)}")
    cells = pixels(frames)
    return float(np.abs(cells[1:-1] - (cells[:-2] + cells[2:]) / 2).mean() / 2.0)
