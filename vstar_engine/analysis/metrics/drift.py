"""Drift: how far the last stretch of a video is from the first, against frames of one stretch."""

import numpy as np


def drift(similarity: np.ndarray, stretch: int) -> float:
    """Returns the mean similarity within the first and last `stretch` frames less that between them; 0: no drift.

    `similarity` is (T, T). Raises ValueError unless both stretches fit and have two frames.
    """
    frames = len(similarity)
    if not 2 <= stretch <= frames // 2:
        raise ValueError(f"a stretch of {frames} frames has 2 to {frames // 2} frames, got {stretch}")
    first, last = similarity[:stretch, :stretch], similarity[-stretch:, -stretch:]
    between = similarity[:stretch, -stretch:]
    apart = ~np.eye(stretch, dtype=bool)
    return float((first[apart].mean() + last[apart].mean()) / 2 - between.mean())
