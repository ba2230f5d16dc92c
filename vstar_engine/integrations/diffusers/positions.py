"""Stretches a motion module's table of positions over clips that are longer than it."""

import torch
from torch import Tensor, nn

from .denoisers import Denoiser


class StretchedPositions(nn.Module):
    """Adds positions to (positions, frames, channels); more frames than the table has are spread over its range.

    Frame f of F is interpolated linearly at f * (N - 1) / (F - 1) of N rows (position interpolation, arXiv 2306.15595, whose
    rotary angles are sines of a table here). Up to N frames the module that was there is called.
    """

    def __init__(self, inner: nn.Module, block: nn.Module):
        super().__init__()
        self.inner = inner
        # no child of this module: the block holds it
        self._block = (block,)

    @property
    def frames(self) -> int:
        """Returns how many frames the table has."""
        return self.inner.pe.shape[1]  # type: ignore[union-attr, return-value, index]

    def forward(self, x: Tensor) -> Tensor:
        frames = x.shape[1]
        if frames <= self.frames:
            return self.inner(x)
        table = self.inner.pe[0]  # type: ignore[index]
        at = torch.arange(frames, device=x.device) * ((self.frames - 1) / (frames - 1))
        below = at.floor().long().clamp(max=self.frames - 2)
        return x + torch.lerp(table[below], table[below + 1], (at - below).to(table.dtype)[:, None])

    @staticmethod
    def on(denoiser: Denoiser) -> "list[StretchedPositions]":
        """Puts itself on every motion module's block that adds positions."""
        blocks = [
            part
            for path, part in denoiser.module.named_modules()
            if "motion_modules" in path and isinstance(getattr(part, "pos_embed", None), nn.Module)
        ]
        stretched = [StretchedPositions(block.pos_embed, block) for block in blocks]  # type: ignore[arg-type]
        for block, positions in zip(blocks, stretched, strict=True):
            block.pos_embed = positions
        return stretched

    def off(self) -> None:
        """Puts the very module back that was there."""
        self._block[0].pos_embed = self.inner
