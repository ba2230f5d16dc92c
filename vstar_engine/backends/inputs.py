"""The UNet's inputs in the form that a built engine takes: every axis expanded."""

from torch import Tensor

from vstar_engine.networks.blocks import repeat_branches
from vstar_engine.networks.precomputed import check_rows


def full(latents: Tensor, timestep: Tensor, context: Tensor, fps: Tensor, tar: Tensor) -> dict[str, Tensor]:
    """Returns `in_full` as contiguous tensors; contiguous ones are not copied."""
    return {name: value.contiguous() for name, value in in_full(latents, timestep, context, fps, tar).items()}


def in_full(latents: Tensor, timestep: Tensor, context: Tensor, fps: Tensor, tar: Tensor) -> dict[str, Tensor]:
    """Returns each argument of `UNet.forward` by name, with shared rows repeated; ValueError for a dense `tar`.

    latents (B, C, T, H, W), timestep (B, T) int64, context (B, T, L, C), fps (B,) int64, tar (B, levels, T) float32. With
    several texts for each video, B counts the texts.
    """
    given = _in_frames(latents, timestep, context, fps, tar)
    return {name: repeat_branches(value, context.shape[0]) for name, value in given.items()}


def shared(latents: Tensor, timestep: Tensor, context: Tensor, fps: Tensor, tar: Tensor) -> dict[str, Tensor]:
    """Returns the same as `full`, but B counts videos, and context is (texts, B, T, L, C)."""
    given = _in_frames(latents, timestep, context, fps, tar)
    given["context"] = given["context"].unflatten(0, (-1, latents.shape[0]))
    return {name: value.contiguous() for name, value in given.items()}


def _in_frames(latents: Tensor, timestep: Tensor, context: Tensor, fps: Tensor, tar: Tensor) -> dict[str, Tensor]:
    """Returns the arguments with one row for each video (each text, in context), expanded over the frames."""
    videos, frames = latents.shape[0], latents.shape[2]
    check_rows(videos, context.shape[0])
    if tar.dim() != 3:
        raise ValueError(f"a built engine takes tar as (1 or B, levels, T), got {tuple(tar.shape)}; a dense one runs in eager")
    return {
        "latents": latents,
        "timestep": timestep.long().expand(videos, frames),
        "context": context.to(latents.dtype).expand(-1, frames, -1, -1),
        "fps": fps.long().expand(videos),
        "tar": tar.float().expand(videos, -1, -1),
    }
