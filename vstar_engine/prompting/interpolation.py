"""Interpolates state embeddings over the frames (video synopsis prompting)."""

from collections.abc import Sequence
from dataclasses import dataclass
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
    return _rows(anchors, where, mode, 0, frames)


def _rows(anchors: Tensor, where: Sequence[int], mode: str, first: int, stop: int) -> Tensor:
    """Returns the embeddings of the frames from `first` up to `stop`, for anchors at the frames `where`."""
    rows = []
    for i, (start, end) in enumerate(pairwise(where)):
        here = slice(max(first - start, 0), max(min(end, stop) - start, 0))
        weight = torch.linspace(0, 1, end - start + 1, dtype=torch.float32, device=anchors.device)[:-1][here]
        if mode == "hold":
            weight = torch.zeros_like(weight)
        elif mode == "ease":
            weight = weight * weight * (3 - 2 * weight)
        weight = weight.to(anchors.dtype)[:, None, None]
        rows.append(anchors[i] * (1 - weight) + anchors[i + 1] * weight)
    return torch.cat([*rows, anchors[-1:].expand(max(stop - max(where[-1], first), 0), *anchors.shape[1:])])


@dataclass(frozen=True, eq=False)
class FrameTexts:
    """The text embeddings of a long clip, interpolated for the frames that are asked for.

    `anchors` (K, 77, C) sit at the frames `where`, ascending from 0; rows have `dtype`.
    """

    anchors: Tensor
    where: tuple[int, ...]
    mode: str
    dtype: torch.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns the rows of frames, (1, stop - start, 77, C), equal to those of `spread`."""
        return _rows(self.anchors.float(), self.where, self.mode, start, stop)[None].to(self.dtype)


def spread_at(anchors: Tensor, where: Sequence[int], frames: Sequence[int], mode: str = "linear") -> Tensor:
    """Returns the rows of `spread` at some frames, (len(frames), 77, C), without the others.

    `where` names the anchors' frames, ascending from 0; frames behind the last one have its state.
    """
    return torch.cat([_rows(anchors, where, mode, frame, frame + 1) for frame in frames])
