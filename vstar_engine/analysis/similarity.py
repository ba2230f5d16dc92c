"""Measures of a video over time: similarity of frames by their distance, coherence, dynamics and scene cuts.

Similarity matrices are (T, T) with ones on the diagonal; the paper draws them with DreamSim (arXiv 2403.13501, Fig. 8, S.1).
"""

from functools import cache
from typing import Any

import numpy as np
import torch

CELL = 8
CUT_LEVEL, CUT_RATIO = 0.12, 4.0


def pixels(frames: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) uint8 -> (T, D) float32: means of 8x8 pixels, centred on mid grey so that cosine tells bright from dark."""
    count, height, width, _ = frames.shape
    cells = frames[:, : height - height % CELL, : width - width % CELL].astype(np.float32) / 127.5 - 1.0
    cells = cells.reshape(count, height // CELL, CELL, width // CELL, CELL, 3).mean((2, 4))
    return cells.reshape(count, -1)


@cache
def _dreamsim() -> tuple[Any, Any]:
    try:
        from dreamsim import dreamsim as load_dreamsim
    except ImportError as error:
        raise ImportError("the DreamSim measure needs the dreamsim package: pip install dreamsim") from error
    return load_dreamsim(pretrained=True, device="cpu")


def dreamsim(frames: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) uint8 -> (T, D) embeddings of the paper's measure; ImportError says what to install."""
    from PIL import Image

    model, preprocess = _dreamsim()
    with torch.inference_mode():
        return np.concatenate([model.embed(preprocess(Image.fromarray(frame))).numpy() for frame in frames])


def cosine(features: np.ndarray) -> np.ndarray:
    """(T, D) features -> (T, T) cosine similarity."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def overlap(shares: np.ndarray) -> np.ndarray:
    """(T, K) shares that sum to one -> (T, T) overlap of two frames' shares."""
    return np.minimum(shares[:, None], shares[None]).sum(-1)


def by_interval(similarity: np.ndarray) -> np.ndarray:
    """(T, T) -> (T,): mean similarity of frames `d` apart, for d = 0 .. T-1."""
    return np.array([np.diagonal(similarity, d).mean() for d in range(len(similarity))])


def neighbours(similarity: np.ndarray) -> float:
    """Returns the coherence: the mean similarity of neighbouring frames."""
    return float(np.diagonal(similarity, 1).mean())


def dynamics(similarity: np.ndarray) -> float:
    """Returns one minus the mean similarity of frames at least half the video apart."""
    return float(1.0 - by_interval(similarity)[len(similarity) // 2 :].mean())


def scene_cuts(frames: np.ndarray) -> list[int]:
    """Returns the frames that begin a new scene: mean change above 0.12 of full scale and four times the median change."""
    changes = np.abs(np.diff(pixels(frames), axis=0)).mean(1) / 2.0
    return [int(i) + 1 for i in np.flatnonzero((changes > CUT_LEVEL) & (changes > CUT_RATIO * np.median(changes)))]
