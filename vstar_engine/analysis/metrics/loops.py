"""Loops: whether a video returns to what it showed."""

from dataclasses import dataclass

import numpy as np

from vstar_engine.analysis.similarity import by_interval

# a video whose frames of one period apart are alike by so much more than those of half of it loops
RETURNS = 0.1
# similarity that counts as equal
SAME = 1e-3


@dataclass(frozen=True)
class Loop:
    """The interval in frames at which a video returns most, and the rise of similarity there above its lowest before."""

    period: int
    rise: float

    @property
    def returns(self) -> bool:
        return self.rise > RETURNS


def loop(similarity: np.ndarray, least: int = 2) -> Loop:
    """Finds the shortest interval, from `least` to two thirds of the video, where similarity rises most above an earlier low.

    similarity is (T, T). Longer intervals have too few pairs of frames to tell. A video that never returns rises by 0.
    """
    alike = by_interval(similarity)[: max(least + 1, 2 * len(similarity) // 3 + 1)]
    rise = alike - np.minimum.accumulate(alike)
    rise[:least] = 0.0
    # of a period's multiples, which return as much, the first
    period = int(np.argmax(rise >= rise.max() - SAME))
    return Loop(period, float(rise[period]))
