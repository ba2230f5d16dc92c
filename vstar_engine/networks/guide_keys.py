"""Guide keys: K and V of some frames, taken in one call of a network and heard by the temporal attentions of the next ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .blocks import TemporalBlock


class GuideKeys:
    """The K and V of `frames` (indices into the recording call) for each temporal attention of a network."""

    def __init__(self, frames: Sequence[int]):
        self.frames = list(frames)
        self.recording = True
        self.held: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def __call__(self, attention: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps the frames of k and v (B, T, P, heads, head_dim) while recording; later returns both with them behind."""
        if self.recording:
            self.held[attention] = k[:, self.frames].clone(), v[:, self.frames].clone()
            return k, v
        kept_k, kept_v = self.held[attention]
        return torch.cat([k, kept_k], dim=1), torch.cat([v, kept_v], dim=1)


@contextmanager
def guided_by(network: nn.Module, keys: GuideKeys) -> Iterator[None]:
    """Has every temporal attention of a network record the keys, or hear them, inside the block."""
    blocks = [part for part in network.modules() if isinstance(part, TemporalBlock)]
    for block in blocks:
        block.more_keys = keys
    try:
        yield
    finally:
        for block in blocks:
            block.more_keys = None
