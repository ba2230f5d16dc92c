"""Temporal attention regularisation as data: the rows `g` that the network takes at each step."""

import torch
from torch import Tensor

from vstar_engine.config.sampling import Tar


def toeplitz(frames: int, sigma: float, strength: float = 1.0) -> Tensor:
    """Returns g[d] = strength * exp(-d^2 / (2 sigma^2)) for frame distances d = 0 .. frames-1.

    `sigma` is in frames. The result is (frames,) float32 on the CPU, computed in float64 (arXiv 2403.13501, eq. 4). Raises
    ValueError for a length below 1 or a sigma that is not a finite number above 0.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    Tar({0: sigma}, strength)
    distance = torch.arange(frames, dtype=torch.float64)
    return (strength * torch.exp(-(distance**2) / (2.0 * sigma**2))).float()


def table(tar: Tar | None, levels: int, frames: int, step: int) -> Tensor:
    """Returns the rows of one sampling step, (1, levels, frames) float32 on the CPU.

    A row is `toeplitz` of its level; zeros, for other levels, without TAR and after `until_step`, are plain attention. `step`
    counts from 0. Raises ValueError when `tar` names a level that the network does not have.
    """
    rows = torch.zeros(1, levels, frames, dtype=torch.float32)
    if tar is None:
        return rows
    tar.check_levels(levels)
    if step <= tar.until_step:
        for level, sigma in tar.sigma.items():
            rows[0, level] = toeplitz(frames, sigma, tar.strength)
    return rows


def tables(tar: Tar | None, levels: int, frames: int, steps: int) -> Tensor:
    """Returns the rows of every step, (steps, levels, frames) float32; raises as `table` does."""
    rows = torch.zeros(steps, levels, frames, dtype=torch.float32)
    if tar is not None:
        rows[: max(0, tar.until_step + 1)] = table(tar, levels, frames, tar.until_step)
    return rows
