"""Shows the weight of each state in each frame, as the interpolation computes it."""

from itertools import groupby
from typing import Any

import torch

from vstar_engine.config.request import Request
from vstar_engine.prompting.interpolation import spread

# weights below this come from rounding
NEGLIGIBLE = 1e-6


def shares(request: Request) -> list[dict[int, float]]:
    """Returns the weights of the states in each frame, by the state's number from 1."""
    count = len(request.states)
    weights = spread(torch.eye(count)[:, None], request.frames, request.mode, request.anchors)[:, 0]
    return [{i: share for i, share in enumerate(row, 1) if share > NEGLIGIBLE} for row in weights.tolist()]


def as_text(request: Request) -> str:
    """Lists the states, then runs of frames that mix the same ones."""
    lines = []
    for i, state in enumerate(request.states, 1):
        unwanted = f"   (not: {request.negatives[i - 1]})" if request.negatives else ""
        lines.append(f"{i:3}  {state}{unwanted}")
    frames = list(enumerate(shares(request)))
    for mixed, run in groupby(frames, key=lambda frame: tuple(frame[1])):
        rows = list(run)
        first, last = rows[0][0], rows[-1][0]
        which = f"frame  {first}" if first == last else f"frames {first}-{last}"
        lines.append(f"{which:16} {_words(mixed, rows[0][1], rows[-1][1])}")
    return "\n".join(lines)


def _words(mixed: tuple[int, ...], first: dict[int, float], last: dict[int, float]) -> str:
    if len(mixed) == 1:
        return f"state {mixed[0]}"
    a, b = mixed
    moves = f"{first[a]:.0%}" if first == last else f"{first[a]:.0%} to {last[a]:.0%}"
    return f"state {a} to {b}, {moves} of {a}"


def as_json(request: Request) -> dict[str, Any]:
    """Returns the states, the frames they sit at and every frame's weights as plain values."""
    frames = [{str(i): round(share, 4) for i, share in row.items()} for row in shares(request)]
    return {"states": request.states, "negatives": request.negatives, "at": request.anchors, "frames": frames}
