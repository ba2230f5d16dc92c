"""What is measured of one video: how it changes, and how well it tells its story, each frame read by the probe."""

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from tools.mini.training import probe
from tools.mini.training.vae import to_network
from vstar_engine.analysis import similarity
from vstar_engine.config.timeline import anchor_frames

from .stories import Shares, Story

INTERVALS = (1, 2, 4, 8, 12, 15, 16, 24, 31, 32, 40, 47, 48, 56, 63)


def spread(frames: int, states: int) -> np.ndarray:
    """(T, K): how much of each state the synopsis gives every frame."""
    where = anchor_frames(states, frames)
    return np.stack([np.interp(np.arange(frames), where, row) for row in np.eye(states)], 1)


def in_order(nearest: np.ndarray, states: int) -> int:
    """Returns how many of the states 0, 1, ... are visited in order: the longest rising sequence, each state once."""
    best = np.zeros(states + 1, int)
    for state in nearest:
        best[state + 1] = max(best[state + 1], best[: state + 1].max() + 1)
    return int(best.max())


def held(nearest: np.ndarray, due: np.ndarray) -> float:
    """Returns how well the frames hold the states in order, 0 to 1: of all divisions into stretches, one a state, the best.

    A state counts by the share of its stretch that shows it, the stretch taken as no shorter than the `due` frames that the
    synopsis gives it; so frames that flicker between states hold none for long, as in_order would have it.
    """
    at = np.arange(len(nearest) + 1)
    length = at[:, None] - at  # of the stretch between two frames
    best = np.where(at == 0, 0.0, -np.inf)  # of the stretches so far, by where they end
    for state, frames in enumerate(due):
        seen = np.concatenate([[0], np.cumsum(nearest == state)])
        share = np.where(length >= 0, (seen[:, None] - seen) / np.maximum(length, max(1, frames)), -np.inf)
        best = (best + share).max(1)
    return float(best[-1] / len(due))


def alignment(read: Shares, told: list[Shares], weights: np.ndarray) -> float:
    """Returns the overlap of what the probe reads in each frame with what its states describe, mean over their factors."""
    said = {name: weights @ np.stack([state[name] for state in told]) for name in told[0]}
    return float(np.mean([np.minimum(read[name], shares).sum(1).mean() for name, shares in said.items()]))


def similarities(frames: np.ndarray, features: np.ndarray, read: Shares) -> dict[str, np.ndarray]:
    """(T, T) by every measure there is."""
    found = {
        "pixels": similarity.cosine(similarity.pixels(frames)),
        "features": similarity.cosine(features),
        "factors": np.mean([similarity.overlap(shares) for shares in read.values()], axis=0),
    }
    if find_spec("dreamsim"):
        found["dreamsim"] = similarity.cosine(similarity.dreamsim(frames))
    return found


def over_time(matrix: np.ndarray) -> dict[str, Any]:
    curve = similarity.by_interval(matrix)
    return {
        "dynamics": similarity.dynamics(matrix),
        "neighbours": similarity.neighbours(matrix),
        "curve": {str(d): curve[d] for d in INTERVALS if d < len(curve)},
    }


def measure(reader: probe.Probe, story: Story, frames: np.ndarray) -> dict[str, Any]:
    """Returns all numbers of one video, and as `nearest` the state that every frame is nearest to, a digit each."""
    images = to_network(frames)
    with torch.inference_mode():
        read = {name: shares.exp().numpy() for name, shares in reader(images).items()}
        features = reader.centred(images).numpy()
    told = [state.shares() for state in story.states]
    # (T, K): how much of what state k says is seen in frame t
    seen = np.stack([np.mean([np.minimum(read[n], s).sum(1) for n, s in state.items()], axis=0) for state in told], 1)
    nearest, weights = seen.argmax(1), spread(len(frames), len(told))
    numbers = {name: over_time(matrix) for name, matrix in similarities(frames, features, read).items()} | {
        "visited": in_order(nearest, len(told)) / len(told),
        "held": held(nearest, np.bincount(weights.argmax(1), minlength=len(told))),
        "at_anchors": np.mean(nearest[anchor_frames(len(told), len(frames))] == np.arange(len(told))),
        "alignment": alignment(read, told, weights),
        "stated": alignment(read, [state.shares() | state.kept_shares() for state in story.states], weights),
        "cuts": len(similarity.scene_cuts(frames)),
    }
    return rounded(numbers) | {"nearest": "".join(map(str, nearest))}


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return round(float(value), 4)
