"""Rotary positions of Wan: their application, and RIFLEx's change of one temporal frequency (arXiv 2502.15894)."""

import math
from typing import Any

import torch
from torch import Tensor

# of the length of the clip, what a period must reach
STRETCH = 0.9


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates neighbouring channels of x (B, N, heads, head_dim) by the angles of cos and sin (1, N, 1, head_dim)."""
    cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return rotated.flatten(-2).type_as(x)


def period(index: int, channels: int, theta: float = 10000.0) -> float:
    """Returns the period in frames of a temporal frequency, counted from 1, of so many channels."""
    return 2 * math.pi * theta ** (2 * (index - 1) / channels)


def riflex(rotary: tuple[Tensor, Tensor], index: int, channels: int, frames: int) -> tuple[Tensor, Tensor]:
    """Returns the table with frequency `index`, counted from 1, lowered to 0.9 * 2 pi / frames; the same where its period
    reaches `frames` already.

    rotary: cos and sin (1, frames * tokens, 1, head_dim), the first `channels` of which are temporal, each angle twice.
    """
    if frames <= period(index, channels):
        return rotary
    cos, sin = (table.clone() for table in rotary)
    tokens = cos.shape[1] // frames
    angle = torch.arange(frames, device=cos.device, dtype=torch.float64) * (STRETCH * 2 * math.pi / frames)
    angle = angle.repeat_interleave(tokens)[None, :, None, None]
    pair = slice(2 * (index - 1), 2 * index)
    cos[..., pair], sin[..., pair] = angle.cos().to(cos.dtype), angle.sin().to(sin.dtype)
    return cos, sin


class Riflex:
    """A hook on a transformer's rotary table."""

    def __init__(self, rope: Any, index: int):
        self.index, self.active = index, True
        self._handle = rope.register_forward_hook(self._after)

    def _after(self, module: Any, args: tuple[Any, ...], rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        frames = args[0].shape[2] // module.patch_size[0]
        return riflex(rotary, self.index, module.t_dim, frames) if self.active else rotary

    def off(self) -> None:
        """Removes the hook."""
        self._handle.remove()
