"""The sampling loop: a sampler's steps with classifier-free guidance. `sample` is a batch of one trajectory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_engine.config.models import V
from vstar_engine.kernels.guided_step import COEFFICIENTS, guided_step

from . import solvers
from .schedule import HISTORY, Schedule

# (latents, timestep (B,) int64, step index) -> the conditional and the unconditional noise prediction, like latents;
# the second is None where guidance is 1
Denoise = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor | None]]


# the place of fresh noise among the coefficients
SIGMA = COEFFICIENTS.index("sigma")


def coefficients(schedule: Schedule, guidance: float | Tensor, start: int = 0) -> Tensor:
    """Returns the coefficients of `guided_step` for each step, without the `start` noisiest, the noisiest first.

    (steps, 8) float64, with HISTORY columns more for a multistep solver; (steps, B, 8 or more) for guidance (B,).
    """
    columns = _columns(schedule, start)
    weight = torch.as_tensor(guidance, dtype=torch.float64).cpu()
    walk = torch.from_numpy(columns).reshape(len(columns), *[1] * weight.dim(), -1)
    return torch.cat([weight[..., None].expand(len(columns), *weight.shape, 1), walk.expand(-1, *weight.shape, -1)], dim=-1)


def _columns(schedule: Schedule, start: int) -> np.ndarray:
    """Returns the coefficients but for guidance, (steps, 7 or more) float64."""
    noise, signal = np.sqrt(1 - schedule.alpha), np.sqrt(schedule.alpha)
    clean = np.stack([noise, 1 / (signal * schedule.scale), schedule.out, schedule.skip], axis=-1)[::-1][start:]
    after = solvers.columns(schedule, start) if schedule.depth else _ddim(schedule)[::-1][start:]
    if schedule.prediction == V:
        # x0 = alpha x - sigma v, and e = (v + sigma x0) / alpha
        noise, signal = noise[::-1][start:], signal[::-1][start:]
        clean[:, 0], clean[:, 1] = noise / signal, signal
        after[:, 0] += after[:, 1] * noise / signal
        after[:, 1] /= signal
    return np.concatenate([clean, after], axis=-1)


def _ddim(schedule: Schedule) -> np.ndarray:
    """Returns kept, direction and sigma of each step, (steps, 3) float64, in ascending timestep order.

    e = e_u + w (e_c - e_u); x0 = (x - sqrt(1 - a) e) / sqrt(a) / scale; then
    sqrt(a_prev) scale_prev x0 + sqrt(1 - a_prev - sigma^2) e + sigma * noise (arXiv 2010.02502, eq. 12, with rescale).
    Where the network predicts v, e is v there: x0 = (sqrt(a) x - sqrt(1 - a) v) / scale, and the noise is put as v and x0.
    With a consistency model's schedule x0 becomes out * x0 + skip * x, and sigma^2 is 1 - a_prev.
    """
    s = schedule
    direction = np.sqrt(np.maximum(1 - s.alpha_prev - s.sigma**2, 0.0))
    return np.stack([np.sqrt(s.alpha_prev) * s.scale_prev, direction, s.sigma], axis=-1)


@dataclass(eq=False)
class Trajectory:
    """Latents (B, C, T, h, w) on their way along a schedule, without its `start` noisiest steps.

    `guidance` is one weight or (B,). `noise` returns the noise of a step by the step's index, counted from 0 after `start`.
    `clean` holds the clean latents predicted by the last step, `drawn` the noise of the next step, and `past` what a multistep
    solver reads of the steps before: (B, HISTORY, C, T, h, w), the newest first.
    """

    latents: Tensor
    schedule: Schedule
    guidance: float | Tensor
    noise: Callable[[int], Tensor]
    start: int = 0
    clean: Tensor | None = None
    drawn: Tensor | None = None
    past: Tensor | None = None

    @property
    def steps(self) -> int:
        return len(self.schedule) - self.start

    @cached_property
    def columns(self) -> Tensor:
        """The coefficients of `guided_step` for each step: (steps, B, 8 or more) float64."""
        weight = torch.as_tensor(self.guidance, dtype=torch.float64).reshape(-1).expand(len(self.latents))
        return coefficients(self.schedule, weight, self.start)

    def draw(self, index: int) -> None:
        """Draws the noise of a step that adds noise."""
        if self.drawn is None and index < self.steps and self.columns[index, 0, SIGMA] > 0:
            self.drawn = self.noise(index)

    def history(self) -> Tensor:
        """Returns `past`, zeros before the first step."""
        if self.past is None:
            self.past = self.latents.new_zeros(len(self.latents), HISTORY, *self.latents.shape[1:])
        return self.past

    def advance(self, latents: Tensor, clean: Tensor) -> None:
        """Takes the latents of the next step and the clean latents that this one predicted."""
        if self.schedule.depth:
            self.past = torch.cat([clean[:, None], self.history()[:, :-1]], dim=1)
        self.latents, self.clean = latents, clean


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
        """Returns the next latents and the predicted clean latents; every kind of loop defines it."""
        raise NotImplementedError

    def walk(self) -> None:
        """Takes every row one step further."""
        latents = torch.cat([row.latents for row in self.rows]) if len(self.rows) > 1 else self.rows[0].latents
        sizes = [len(row.latents) for row in self.rows]
        made = [(x,) if len(sizes) == 1 else x.split(sizes) for x in self.advance(latents)]
        for row, x, clean in zip(self.rows, *made, strict=True):
            row.advance(x, clean)
        self.done += 1

    @property
    def depth(self) -> int:
        """Returns how many predictions of earlier steps some row reads."""
        return max(row.schedule.depth for row in self.rows)

    def coefficients(self) -> Tensor:
        """Returns the coefficients of `guided_step` for this step, (videos, 8 + depth): zeros for what a row does not read."""
        if self._coefficients is None:
            width = len(COEFFICIENTS) + self.depth
            every = [F.pad(row.columns, (0, width - row.columns.shape[-1])) for row in self.rows]
            self._coefficients = torch.cat(every, dim=1).to(self.rows[0].latents)
        return self._coefficients[self.done]

    def history(self) -> Tensor | None:
        """Returns the clean latents that earlier steps predicted, (videos, depth, ...), or None where no row reads them."""
        return torch.cat([row.history() for row in self.rows]) if self.depth else None

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
        return guided_step(latents, eps, plain, self.coefficients(), self.noise(latents), self.history())


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
