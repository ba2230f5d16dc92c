"""All measures of one video as a row of plain values."""

from collections.abc import Collection
from typing import Any

import numpy as np

from vstar_engine.analysis import similarity

from .drift import drift
from .flicker import flicker
from .loops import loop
from .mawe import mawe
from .optical_flow import FLOW, flows
from .scene_cuts import scene_cuts
from .seams import seams

# frames of the first and last stretch, at most a quarter of the video each
STRETCH = 64


def summary(frames: np.ndarray, borders: Collection[int] = (), fps: float = 8.0) -> dict[str, Any]:
    """Measures (T, H, W, 3) uint8 frames, of at least 8; `borders` are those of its windows (`seams`).

    Frames are compared by the cosine of their means of 8x8 pixels. Higher is better for `across` and `neighbours`, lower for
    `seam_ratio`, `flicker`, `cuts` and `mawe`; `drift`, `dynamics` and `loop_rise` describe.
    """
    alike = similarity.cosine(similarity.pixels(frames))
    joined, returned, warped = seams(alike, borders), loop(alike), mawe(frames, flows(frames))
    return {
        "frames": len(frames),
        "neighbours": similarity.neighbours(alike),
        "across": joined.across,
        "inside": joined.inside,
        "worst_seam": joined.worst,
        "seam_ratio": joined.ratio,
        "drift": drift(alike, min(STRETCH, len(frames) // 4)),
        "dynamics": similarity.dynamics(alike),
        "loop_period": returned.period,
        "loop_rise": returned.rise,
        "flicker": flicker(frames),
        "cuts": len(scene_cuts(frames, fps)),
        "mawe": warped.mean_of_ratios,
        "mawe_of_means": warped.ratio_of_means,
        "motion": float(warped.motions.mean()),
        "flow": FLOW,
    }
