"""The sampling loop: DDIM and consistency steps with classifier-free guidance. `sample` is a batch of one trajectory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from vstar_engine.kernels.guided_step import guided_step

from .schedule import Schedule

# (latents, timestep (B,) int64, step index) -> the conditional and the unconditional noise prediction, like latents;
# the second is None where guidance is 1
Denoise = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor | None]]


def coefficients(schedule: Schedule, guidance: float | Tensor) -> Tensor:
    """Returns the coefficients of `guided_step` for each step, the noisiest first: (steps, 8) float64; (steps, B, 8) for (B,).

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


@dataclass(eq=False)
class Trajectory:
    """Latents (B, C, T, h, w) on their way along a schedule, without its `start` noisiest steps.

    `guidance` is one weight or (B,). `noise` returns the noise of a step by the step's index, counted from 0 after `start`.
    `clean` holds the clean latents predicted by the last step, `drawn` the noise of the next step.
    """

    latents: Tensor
    schedule: Schedule
    guidance: float | Tensor
    noise: Callable[[int], Tensor]
    start: int = 0
    clean: Tensor | None = None
    drawn: Tensor | None = None

    @property
    def steps(self) -> int:
        return len(self.schedule) - self.start

    def coefficients(self) -> Tensor:
        """Returns the coefficients of `guided_step` for each step: (steps, B, 8) float64."""
        weight = torch.as_tensor(self.guidance, dtype=torch.float64).reshape(-1).expand(len(self.latents))
        return coefficients(self.schedule, weight)[self.start :]

    def draw(self, index: int) -> None:
        """Draws the noise of a step that adds noise."""
        if self.drawn is None and index < self.steps and self.schedule.sigma[self.steps - 1 - index] > 0:
            self.drawn = self.noise(index)


TrajectoryT = TypeVar("TrajectoryT", bound=Trajectory)


class SamplingLoop(Generic[TrajectoryT]):
    """Trajectories that are sampled together; `done` counts steps. A subclass computes a step in `advance`."""

    rows: list[TrajectoryT]
    done: int = 0
    _coefficients: Tensor | None = None

    @property
    def steps(self) -> int:
        return self.rows[0].steps

    def advance(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the next latents and the predicted clean latents."""
        raise NotImplementedError

    def walk(self) -> None:
        """Takes every row one step further."""
        latents = torch.cat([row.latents for row in self.rows]) if len(self.rows) > 1 else self.rows[0].latents
        sizes = [len(row.latents) for row in self.rows]
        made = [(x,) if len(sizes) == 1 else x.split(sizes) for x in self.advance(latents)]
        for row, x, clean in zip(self.rows, *made, strict=True):
            row.latents, row.clean = x, clean
        self.done += 1

    def coefficients(self) -> Tensor:
        """Returns the coefficients of `guided_step` for this step, (videos, 8)."""
        if self._coefficients is None:
            self._coefficients = torch.cat([row.coefficients() for row in self.rows], dim=1).to(self.rows[0].latents)
        return self._coefficients[self.done]

    def noise(self, latents: Tensor) -> Tensor:
        """Returns the noise of this step on the device, zeros for rows whose step adds none."""
        noise, at = torch.zeros_like(latents), 0
        for row in self.rows:
            row.draw(self.done)
            if row.drawn is not None:
                noise[at : at + len(row.latents)].copy_(row.drawn, non_blocking=True)
                row.drawn = None
            at += len(row.latents)
        return noise


class Sampler(SamplingLoop[Trajectory]):
    """One trajectory through a function that predicts both branches."""

    def __init__(self, denoise: Denoise, row: Trajectory):
        self.denoise, self.rows = denoise, [row]

    @property
    def timestep(self) -> int:
        return int(self.rows[0].schedule.timesteps[self.steps - 1 - self.done])

    def advance(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        timestep = torch.full((len(latents),), self.timestep, device=latents.device)
        cond, uncond = self.denoise(latents, timestep, self.done)
        plain = torch.arange(len(latents), device=latents.device)
        if uncond is None:
            eps = cond
        else:
            eps, plain = torch.cat([cond, uncond]), plain + len(latents)
        return guided_step(latents, eps, plain, self.coefficients(), self.noise(latents))


def sample(
    denoise: Denoise,
    schedule: Schedule,
    latents: Tensor,
    *,
    guidance: float | Tensor,
    noise: Tensor | Callable[[int], Tensor] | None = None,
    start: int = 0,
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Denoises `latents` (B, C, T, H, W) float32; yields (index, timestep, latents, pred_x0) after every step.

    `index` counts from 0. `pred_x0` are the clean latents that the step predicts; both are like `latents`.
    `denoise` returns the conditional and the unconditional noise. `guidance` is a number or (B,): e_u + w (e_c - e_u).
    `noise` is (steps, *latents.shape), a function of the step's index, or None to draw it on the CPU. `start` skips that many
    of the noisiest steps. Raises ValueError for a `start` that leaves no step. DDIM, arXiv 2010.02502, eq. 12; classifier-free
    guidance, arXiv 2207.12598.
    """
    if not 0 <= start < len(schedule):
        raise ValueError(f"start must be 0 to {len(schedule) - 1} for {len(schedule)} steps, got {start}")
    shape = latents.shape
    draw = (
        noise if callable(noise) else lambda index: torch.randn(shape, dtype=torch.float32) if noise is None else noise[index]
    )
    row = Trajectory(latents, schedule, guidance, draw, start)
    loop = Sampler(denoise, row)
    for index in range(row.steps):
        timestep = loop.timestep
        loop.walk()
        assert row.clean is not None
        yield index, timestep, row.latents, row.clean
