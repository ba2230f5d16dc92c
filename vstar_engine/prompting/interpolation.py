"""Interpolates state embeddings over the frames (video synopsis prompting)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vstar_engine.config.timeline import SPREAD_MODES, anchor_frames, check_anchors


def spread(anchors: Tensor, frames: int, mode: str = "linear", at: Sequence[int] | None = None) -> Tensor:
    """Interpolates K state embeddings (K, 77, C) over the frames: (frames, 77, C), in their dtype, on their device.

    `linear` interpolates between neighbours, `ease` with smoothed weights (3 w^2 - 2 w^3). `hold` keeps each anchor until the
    next one's frame, the last to the end. `at` names the anchors' frames: ascending from 0, the last being frames-1 except
    with `hold`; by default they are evenly spaced. Raises ValueError for more anchors than frames, a bad `at` or mode.
    Video synopsis prompting, arXiv 2403.13501.
    """
    count = len(anchors)
    if not 1 <= count <= frames:
        raise ValueError(f"there must be 1 to {frames} states for {frames} frames, got {count}")
    if mode not in SPREAD_MODES:
        raise ValueError(f"mode must be one of {', '.join(SPREAD_MODES)}, got {mode!r}")
    where = anchor_frames(count, frames) if at is None else list(at)
    check_anchors(where, count, frames, mode)
    rows = []
    for i, (start, end) in enumerate(pairwise(where)):
        weight = torch.linspace(0, 1, end - start + 1, dtype=torch.float32, device=anchors.device)[:-1]
        if mode == "hold":
            weight = torch.zeros_like(weight)
        elif mode == "ease":
            weight = weight * weight * (3 - 2 * weight)
        weight = weight.to(anchors.dtype)[:, None, None]
        rows.append(anchors[i] * (1 - weight) + anchors[i + 1] * weight)
    return torch.cat([*rows, anchors[-1:].expand(frames - where[-1], *anchors.shape[1:])])
