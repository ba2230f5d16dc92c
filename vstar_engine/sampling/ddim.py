"""DDIM and consistency sampling with classifier-free guidance, as a generator that yields each step."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from vstar_engine.kernels.guided_step import guided_step

from .schedule import Schedule

# (latents, timestep (B,) int64, step index) -> the conditional and the unconditional noise prediction, like latents;
# the second is None where guidance is 1
Denoise = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor | None]]


def coefficients(schedule: Schedule, guidance: float | Tensor) -> Tensor:
    """Returns what `guided_step` takes at each step, the noisiest first: (steps, 8) float64; guidance (B,): (steps, B, 8).

    e = e_u + w (e_c - e_u); x0 = (x - sqrt(1 - a) e) / sqrt(a) / scale; then
    sqrt(a_prev) scale_prev x0 + sqrt(1 - a_prev - sigma^2) e + sigma * noise (arXiv 2010.02502, eq. 12, with rescale).
    With a consistency model's schedule x0 becomes out * x0 + skip * x, and sigma^2 is 1 - a_prev.
    """
    s = schedule
    direction = np.sqrt(np.maximum(1 - s.alpha_prev - s.sigma**2, 0.0))
    inverse, kept = 1 / (np.sqrt(s.alpha) * s.scale), np.sqrt(s.alpha_prev) * s.scale_prev
    columns = np.stack([np.sqrt(1 - s.alpha), inverse, s.out, s.skip, kept, direction, s.sigma], axis=-1)
    weight = torch.as_tensor(guidance, dtype=torch.float64).cpu()
    walk = torch.from_numpy(columns[::-1].copy()).reshape(len(s), *[1] * weight.dim(), -1)
    return torch.cat([weight[..., None].expand(len(s), *weight.shape, 1), walk.expand(-1, *weight.shape, -1)], dim=-1)


def sample(
    denoise: Denoise,
    schedule: Schedule,
    latents: Tensor,
    *,
    guidance: float | Tensor,
    noise: Tensor | Callable[[int], Tensor] | None = None,
    start: int = 0,
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Denoises `latents` (B, C, T, H, W) float32, yielding (index, timestep, latents, pred_x0) after every step.

    guidance is a number or (B,), used as e_u + w (e_c - e_u); noise is the tape (steps, *latents.shape), a function of the
    step's index, or None to draw it on the CPU; `start` skips that many of the noisiest steps. The index counts from 0.
    """
    if not 0 <= start < len(schedule):
        raise ValueError(f"start must be 0 to {len(schedule) - 1} for {len(schedule)} steps, got {start}")
    shape, device = latents.shape, latents.device
    draw = noise if callable(noise) else lambda i: torch.randn(shape, dtype=torch.float32) if noise is None else noise[i]
    weight = torch.as_tensor(guidance, dtype=torch.float64).reshape(-1).expand(len(latents))
    table, heard = coefficients(schedule, weight).to(latents), torch.arange(len(latents), device=device)
    for index, i in enumerate(reversed(range(len(schedule) - start))):
        timestep = torch.full((len(latents),), int(schedule.timesteps[i]), device=device)
        conditional, unconditional = denoise(latents, timestep, index)
        eps = conditional if unconditional is None else torch.cat([conditional, unconditional])
        plain = heard if unconditional is None else heard + len(latents)
        fresh = draw(index).to(latents) if schedule.sigma[i] > 0 else torch.zeros_like(latents)
        latents, pred_x0 = guided_step(latents, eps, plain, table[start + index], fresh)
        yield index, int(schedule.timesteps[i]), latents, pred_x0
