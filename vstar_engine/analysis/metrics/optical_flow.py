"""Optical flow between neighbouring frames, by OpenCV's DIS (Kroeger et al., arXiv 1603.03590)."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from vstar_engine.errors import MissingLibrary

# the name that measured rows carry
FLOW = "DIS medium"


def flows(frames: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the flow from each frame to the next, (2, H, W) float32 in pixels, x before y, of (T, H, W, 3) uint8.

    MissingLibrary names the extra to install; ValueError for frames under 16 pixels, which DIS does not take.
    """
    try:
        import cv2
    except ImportError as error:
        raise MissingLibrary("optical flow needs OpenCV: pip install 'vstar-engine[metrics]'") from error
    if min(frames.shape[1:3]) < 16:
        raise ValueError(f"optical flow needs frames of at least 16x16 pixels, got {frames.shape[1]}x{frames.shape[2]}")
    method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    for before, after in pairwise(grey):
        flow = np.zeros((*before.shape, 2), np.float32)
        yield np.moveaxis(np.asarray(method.calc(before, after, flow)), -1, 0)
