"""DDIM and consistency sampling with classifier-free guidance, as a generator that yields each step."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .schedule import Schedule

# (latents, timestep (B,) int64, step index) -> the conditional and the unconditional noise prediction, like latents;
# the second is None where guidance is 1
Denoise = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor | None]]


def advance(
    schedule: Schedule,
    i: int,
    latents: Tensor,
    conditional: Tensor,
    unconditional: Tensor | None,
    guidance: float | Tensor,
    draw: Callable[[], Tensor],
) -> tuple[Tensor, Tensor]:
    """Takes latents from the schedule's i-th timestep to the one before it: (latents, pred_x0).

    e = e_u + w (e_c - e_u); x0 = (x - sqrt(1 - a) e) / sqrt(a) / scale; then
    sqrt(a_prev) scale_prev x0 + sqrt(1 - a_prev - sigma^2) e + sigma * noise (arXiv 2010.02502, eq. 12, with rescale).
    With a consistency model's schedule x0 becomes out * x0 + skip * x, and sigma^2 is 1 - a_prev.
    """
    eps = conditional if unconditional is None else unconditional + guidance * (conditional - unconditional)
    alpha, alpha_prev, sigma = float(schedule.alpha[i]), float(schedule.alpha_prev[i]), float(schedule.sigma[i])
    pred_x0 = (latents - (1 - alpha) ** 0.5 * eps) / alpha**0.5 / float(schedule.scale[i])
    if schedule.skip[i]:
        pred_x0 = float(schedule.out[i]) * pred_x0 + float(schedule.skip[i]) * latents
    direction = max(1 - alpha_prev - sigma**2, 0.0) ** 0.5 * eps
    latents = alpha_prev**0.5 * float(schedule.scale_prev[i]) * pred_x0 + direction
    if sigma > 0:
        latents = latents + sigma * draw().to(latents)
    return latents, pred_x0


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
    shape = latents.shape
    draw = noise if callable(noise) else lambda i: torch.randn(shape) if noise is None else noise[i]
    weight = torch.as_tensor(guidance, dtype=latents.dtype, device=latents.device).reshape(-1, *[1] * (latents.dim() - 1))
    for index, i in enumerate(reversed(range(len(schedule) - start))):
        timestep = torch.full((len(latents),), int(schedule.timesteps[i]), device=latents.device)
        conditional, unconditional = denoise(latents, timestep, index)
        latents, pred_x0 = advance(schedule, i, latents, conditional, unconditional, weight, partial(draw, index))
        yield index, int(timestep[0]), latents, pred_x0
