"""The noise schedule: betas, alpha_bar, the dynamic rescale, DDIM's and consistency models' timesteps, all in float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vstar_engine.config.sampling import CONSISTENCY_STEPS, FEW_STEP, TRAINING_STEPS, Sampling

BETA_START, BETA_END = 0.00085, 0.012
SCALE_END, SCALE_STEPS, SCALE_ENTRIES = 0.7, 400, 1400
# boundary condition of latent consistency models: the data's standard deviation, and the scale of timesteps
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0


def betas() -> np.ndarray:
    """Returns the 1000 training betas: linear in their square roots, float64."""
    return np.linspace(BETA_START**0.5, BETA_END**0.5, TRAINING_STEPS) ** 2


def alpha_bar() -> np.ndarray:
    """Returns the cumulative products of 1 - beta, (1000,) float64."""
    return np.cumprod(1.0 - betas())


def scale_arr() -> np.ndarray:
    """Returns the dynamic rescale: 1 falling to 0.7 over 400 entries, then 0.7; (1400,) float64."""
    return np.concatenate([np.linspace(1.0, SCALE_END, SCALE_STEPS), np.full(SCALE_ENTRIES - SCALE_STEPS, SCALE_END)])


def buffers() -> dict[str, np.ndarray]:
    """Returns the thirteen schedule arrays that an official checkpoint carries, under their names there."""
    beta, alpha = betas(), alpha_bar()
    previous = np.append(1.0, alpha[:-1])
    variance = beta * (1 - previous) / (1 - alpha)
    return {
        "betas": beta,
        "alphas_cumprod": alpha,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(alpha),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alpha),
        "log_one_minus_alphas_cumprod": np.log(1 - alpha),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alpha),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alpha - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.append(variance[1], variance[1:])),
        "posterior_mean_coef1": beta * np.sqrt(previous) / (1 - alpha),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - beta) / (1 - alpha),
        "scale_arr": scale_arr(),
    }


def ddim_timesteps(steps: int) -> np.ndarray:
    """Returns exactly `steps` ascending timesteps in 0..999; for divisors of 1000 the published 1, 1 + 1000/steps, ..."""
    if not 1 <= steps <= TRAINING_STEPS:
        raise ValueError(f"steps must be 1 to {TRAINING_STEPS}, got {steps}")
    offset = min(1, TRAINING_STEPS - steps)  # all thousand only fit without the published shift by one
    return np.arange(steps) * TRAINING_STEPS // steps + offset


def consistency_timesteps(steps: int) -> np.ndarray:
    """Returns `steps` ascending timesteps, spread over a teacher's 50 (19, 39, ..., 999), always with the noisiest."""
    if not 1 <= steps <= CONSISTENCY_STEPS:
        raise ValueError(f"a consistency model takes 1 to {CONSISTENCY_STEPS} steps, got {steps}")
    apart = TRAINING_STEPS // CONSISTENCY_STEPS
    noisiest_first = np.arange(CONSISTENCY_STEPS, 0, -1) * apart - 1
    return noisiest_first[np.arange(steps) * CONSISTENCY_STEPS // steps][::-1]


@dataclass(frozen=True)
class Schedule:
    """The constants of one sampling run, (steps,) float64 each, in ascending order of timesteps; sampling goes backwards.

    `alpha` and `alpha_prev` are the cumulative alphas of a step and of the one after it, `sigma` the standard deviation of the
    noise that the step adds, `scale` and `scale_prev` the dynamic rescale. A consistency model's x0 is `out` times the
    predicted x0 plus `skip` times the latents; for DDIM out = 1 and skip = 0.
    """

    timesteps: np.ndarray
    alpha: np.ndarray
    alpha_prev: np.ndarray
    sigma: np.ndarray
    scale: np.ndarray
    scale_prev: np.ndarray
    skip: np.ndarray
    out: np.ndarray

    @staticmethod
    def of(sampling: Sampling) -> "Schedule":
        """Builds the schedule for sampling settings."""
        if FEW_STEP in sampling.fast:
            return Schedule.consistency(sampling.steps)
        return Schedule.ddim(sampling.steps, eta=sampling.eta)

    @staticmethod
    def ddim(steps: int | None = None, timesteps: Sequence[int] | np.ndarray | None = None, eta: float = 1.0) -> "Schedule":
        """Builds a DDIM schedule (arXiv 2010.02502, eq. 16) from a number of steps or from explicit timesteps.

        Raises ValueError unless exactly one of both is given and the timesteps ascend within 0..999.
        """
        if (steps is None) == (timesteps is None):
            raise ValueError("give either steps or timesteps, not both and not neither")
        if steps is not None:
            taken = ddim_timesteps(steps)
        else:
            taken = np.asarray(timesteps, dtype=np.int64)
            if taken.ndim != 1 or not len(taken) or taken[0] < 0 or taken[-1] >= TRAINING_STEPS or (np.diff(taken) <= 0).any():
                raise ValueError(f"timesteps must ascend within 0..{TRAINING_STEPS - 1}, got {taken.tolist()}")
        every_alpha, every_scale = alpha_bar(), scale_arr()
        alpha, scale = every_alpha[taken], every_scale[taken]
        alpha_prev = np.append(every_alpha[0], alpha[:-1])
        scale_prev = np.append(every_scale[0], scale[:-1])
        sigma = eta * np.sqrt((1 - alpha_prev) / (1 - alpha) * np.maximum(1 - alpha / alpha_prev, 0.0))
        return Schedule(taken, alpha, alpha_prev, sigma, scale, scale_prev, np.zeros(len(taken)), np.ones(len(taken)))

    @staticmethod
    def consistency(steps: int) -> "Schedule":
        """Builds the multistep schedule of a latent consistency model (arXiv 2310.04378, algorithm 3).

        Every step predicts the clean latents; all but the last then add the full noise of the next timestep.
        """
        taken = consistency_timesteps(steps)
        alpha, scale = alpha_bar()[taken], scale_arr()[taken]
        alpha_prev, scale_prev = np.append(1.0, alpha[:-1]), np.append(1.0, scale[:-1])
        scaled = TIMESTEP_SCALING * taken
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / np.sqrt(scaled**2 + SIGMA_DATA**2)
        return Schedule(taken, alpha, alpha_prev, np.sqrt(1 - alpha_prev), scale, scale_prev, skip, out)

    def __len__(self) -> int:
        return len(self.timesteps)
