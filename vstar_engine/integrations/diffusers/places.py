"""Places states on a clip's frames, and their weights on its latent frames."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vstar_engine.config.timeline import SPREAD_MODES, Position, anchor_frames, check_anchors, parse_position, place
from vstar_engine.prompting.synopsis import Synopsis

# a state's text, or its place and its text
State = str | tuple[str | int | float, str]


def _seconds(place: str) -> float | None:
    """Reads "1.8s"; None for another kind of place."""
    if not place.endswith("s"):
        return None
    try:
        return float(place[:-1])
    except ValueError as error:
        raise ValueError(f"a place in seconds is a number such as 1.8s, got {place!r}") from error


def position(place: str | int | float, fps: float) -> Position:
    """Reads a place as `--at` does (12 is a frame, 0.5 or "50%" a share), and "1.8s" as seconds at `fps`."""
    if not isinstance(place, str):
        return place
    seconds = _seconds(place)
    return parse_position(place) if seconds is None else round(seconds * fps)


def split(states: Sequence[State] | Synopsis) -> tuple[list[str], list[str | int | float]]:
    """Separates texts and places; no places where no state has one. A first state without one sits at frame 0."""
    if isinstance(states, Synopsis):
        if states.durations:
            raise ValueError("a timeline places states, and this synopsis has durations: give it `at`")
        return list(states.states), list(states.at)
    if isinstance(states, str) or not states:
        raise ValueError(f"a timeline is a list of states, each a text or (place, text), got {states!r}")
    texts = [state if isinstance(state, str) else state[1] for state in states]
    places = [None if isinstance(state, str) else state[0] for state in states]
    if all(place is None for place in places):
        return texts, []
    found = [0 if place is None and i == 0 else place for i, place in enumerate(places)]
    kept = [place for place in found if place is not None]
    if len(kept) != len(found):
        raise ValueError("give every state but the first a place, or none of them")
    return texts, kept


def frame_weights(
    places: Sequence[str | int | float], count: int, frames: int, fps: float, transition: str | float | None, mode: str
) -> Tensor:
    """Returns each state's weight in each frame: (frames, count) float32, rows that sum to 1.

    Without a transition the weights are `prompting.interpolation.spread`'s by `mode`. With one a state stays until the next
    one's begins, `transition` frames (or "0.3s") before that one's place, and they change linearly between; the last state
    stays to the end. Raises ValueError for places that do not ascend from frame 0, or a transition that is no length.
    """
    if mode not in SPREAD_MODES:
        raise ValueError(f"mode must be one of {', '.join(SPREAD_MODES)}, got {mode!r}")
    if not 1 <= count <= frames:
        raise ValueError(f"there must be 1 to {frames} states for {frames} frames, got {count}")
    at = [position(place, fps) for place in places]
    # the last state may sit before the clip's end, where it stays
    where = place(count, frames, "hold", at) if at else anchor_frames(count, frames)
    check_anchors(where, count, frames, "hold")
    length = None if transition is None else _length(transition, fps)
    weights = torch.zeros(frames, count)
    weights[where[-1] :, -1] = 1.0
    for i, (start, end) in enumerate(pairwise(where)):
        over = end - start if length is None else min(length, end - start)
        later = torch.linspace(0, 1, end - start + 1)[:-1]
        if length is not None:
            later = (1 - (end - torch.arange(start, end)) / over).clamp(min=0.0) if over > 0 else torch.zeros(end - start)
        elif mode == "hold":
            later = torch.zeros_like(later)
        elif mode == "ease":
            later = later * later * (3 - 2 * later)
        weights[start:end, i], weights[start:end, i + 1] = 1 - later, later
    return weights


def _length(transition: str | float, fps: float) -> float:
    seconds = _seconds(transition) if isinstance(transition, str) else None
    try:
        length = float(transition) if seconds is None else seconds * fps
    except ValueError as error:
        raise ValueError(f"a transition is frames such as 5, or seconds such as 0.3s, got {transition!r}") from error
    if not (math.isfinite(length) and length >= 0):
        raise ValueError(f"a transition is a length from 0 up, got {transition!r}")
    return length


def latent_weights(weights: Tensor, latent_frames: int) -> Tensor:
    """Averages weights (frames, K) over the frames of each latent frame: the first holds one frame, the others as many each."""
    frames = len(weights)
    if latent_frames == frames:
        return weights
    per, rest = divmod(frames - 1, max(1, latent_frames - 1))
    if rest:
        raise ValueError(f"{frames} frames are not 1 + a multiple of the {latent_frames - 1} later latent frames")
    return torch.cat([weights[:1], weights[1:].unflatten(0, (latent_frames - 1, per)).mean(1)])


def relay_bias(places: Sequence[int], latent_frames: int, epsilon: float = 1e-3) -> Tensor:
    """Returns Prompt Relay's bias of each frame's logits to each state's text: (latent_frames, K) float32 (2604.10030).

    A state's segment goes from its place to the next one's, L latent frames with the middle m:
    -relu(|f - m| - w)^2 / (2 sigma^2), w = L / 2 - 2, sigma = 1 / ln(1 / epsilon).
    """
    sigma = 1 / math.log(1 / epsilon)
    frame = torch.arange(latent_frames, dtype=torch.float32)
    columns = []
    for start, end in pairwise([*places, latent_frames]):
        middle, reach = (start + end - 1) / 2, (end - start) / 2 - 2
        columns.append(-(((frame - middle).abs() - reach).clamp(min=0.0) ** 2) / (2 * sigma**2))
    return torch.stack(columns, dim=1)
