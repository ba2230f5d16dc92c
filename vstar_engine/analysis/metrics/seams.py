"""Seams: how alike neighbouring frames are across the borders of windows, against those inside."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Seams:
    """The mean similarity of neighbours `across` borders and `inside`, and that of the `worst` pair across.

    NaN where a video has no such pair.
    """

    across: float
    inside: float
    worst: float

    @property
    def ratio(self) -> float:
        """Returns the dissimilarity across borders over that inside: 1 where seams cannot be told from the rest."""
        return (1.0 - self.across) / max(1.0 - self.inside, 1e-12)


def seams(similarity: np.ndarray, borders: Collection[int]) -> Seams:
    """Compares neighbours of a (T, T) similarity at `borders` with the others; border t lies between frames t-1 and t.

    Raises ValueError for a border outside of 1 .. T-1.
    """
    frames = len(similarity)
    if not all(0 < border < frames for border in borders):
        raise ValueError(f"a border lies within 1 to {frames - 1}, got {sorted(borders)}")
    pairs = np.diagonal(similarity, 1)
    chosen = np.zeros(len(pairs), bool)
    chosen[[border - 1 for border in borders]] = True
    across, inside = pairs[chosen], pairs[~chosen]
    return Seams(_mean(across), _mean(inside), float(across.min()) if len(across) else float("nan"))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
