"""The noise schedule: betas, alpha_bar, the dynamic rescale, DDIM's and consistency models' timesteps, all in float64."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vstar_engine.config.models import EPS, NoiseSpec, V
from vstar_engine.config.sampling import CONSISTENCY_STEPS, DDIM, FEW_STEP, LEADING, TRAILING, TRAINING_STEPS, Sampling

SCALE_END, SCALE_STEPS, SCALE_ENTRIES = 0.7, 400, 1400
# boundary condition of latent consistency models: the data's standard deviation, and the scale of timesteps
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
# predicted clean latents of earlier steps that a multistep solver's update reads
HISTORY = 2
PUBLISHED = NoiseSpec()


def betas(noise: NoiseSpec = PUBLISHED) -> np.ndarray:
    """Returns the 1000 training betas: linear in their square roots, float64."""
    return np.linspace(noise.beta_start**0.5, noise.beta_end**0.5, TRAINING_STEPS) ** 2


def alpha_bar(noise: NoiseSpec = PUBLISHED) -> np.ndarray:
    """Returns the cumulative products of 1 - beta, (1000,) float64."""
    return np.cumprod(1.0 - betas(noise))


def scales(noise: NoiseSpec = PUBLISHED) -> np.ndarray:
    """Returns what clean latents are scaled by at each training timestep, (1000,) float64: the dynamic rescale, or ones."""
    return scale_arr()[:TRAINING_STEPS] if noise.rescale else np.ones(TRAINING_STEPS)


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


def ddim_timesteps(steps: int, spacing: str = LEADING, shift: int = 1) -> np.ndarray:
    """Returns exactly `steps` ascending timesteps in 0..999.

    Leading: for divisors of 1000 the published 1, 1 + 1000/steps, ..., of a model whose timesteps are shifted by 1. Trailing:
    1000/steps - 1, ..., 999 (arXiv 2305.08891).
    """
    if not 1 <= steps <= TRAINING_STEPS:
        raise ValueError(f"steps must be 1 to {TRAINING_STEPS}, got {steps}")
    if spacing == TRAILING:
        return np.round(np.arange(1, steps + 1) * (TRAINING_STEPS / steps)).astype(np.int64) - 1
    offset = min(shift, TRAINING_STEPS - steps)  # all thousand only fit without the published shift by one
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

    `alpha` and `alpha_prev` are the cumulative alphas of a step and of the one after it, `scale` and `scale_prev` the dynamic
    rescale. `sigma` is the standard deviation of the noise that a step of DDIM adds, which other samplers do not read. A
    consistency model's x0 is `out` times the predicted x0 plus `skip` times the latents; else out = 1 and skip = 0.
    `prediction` is what the network predicts, as in `NoiseSpec`.
    """

    timesteps: np.ndarray
    alpha: np.ndarray
    alpha_prev: np.ndarray
    sigma: np.ndarray
    scale: np.ndarray
    scale_prev: np.ndarray
    skip: np.ndarray
    out: np.ndarray
    prediction: str = EPS
    sampler: str = DDIM

    def __post_init__(self) -> None:
        if self.prediction == V and (self.scale != 1).any():
            raise ValueError("a network that predicts v is known without the dynamic rescale only, and this schedule has it")

    @staticmethod
    def of(sampling: Sampling, noise: NoiseSpec = PUBLISHED) -> "Schedule":
        """Builds the schedule for sampling settings and a model's noise."""
        if FEW_STEP in sampling.fast:
            return Schedule.consistency(sampling.steps, noise)
        schedule = Schedule.ddim(sampling.steps, eta=sampling.eta, spacing=sampling.spacing, noise=noise)
        return replace(schedule, sampler=sampling.sampler)

    @staticmethod
    def ddim(
        steps: int | None = None,
        timesteps: Sequence[int] | np.ndarray | None = None,
        eta: float = 1.0,
        spacing: str = LEADING,
        noise: NoiseSpec = PUBLISHED,
    ) -> "Schedule":
        """Builds a DDIM schedule (arXiv 2010.02502, eq. 16) from a number of steps, spaced so, or from explicit timesteps.

        Raises ValueError unless exactly one of both is given and the timesteps ascend within 0..999.
        """
        if (steps is None) == (timesteps is None):
            raise ValueError("give either steps or timesteps, not both and not neither")
        if steps is not None:
            taken = ddim_timesteps(steps, spacing, noise.offset)
        else:
            taken = np.asarray(timesteps, dtype=np.int64)
            if taken.ndim != 1 or not len(taken) or taken[0] < 0 or taken[-1] >= TRAINING_STEPS or (np.diff(taken) <= 0).any():
                raise ValueError(f"timesteps must ascend within 0..{TRAINING_STEPS - 1}, got {taken.tolist()}")
        every_alpha, every_scale = alpha_bar(noise), scales(noise)
        alpha, scale = every_alpha[taken], every_scale[taken]
        alpha_prev = np.append(1.0 if noise.last_is_clean else every_alpha[0], alpha[:-1])
        scale_prev = np.append(every_scale[0], scale[:-1])
        sigma = eta * np.sqrt((1 - alpha_prev) / (1 - alpha) * np.maximum(1 - alpha / alpha_prev, 0.0))
        skip, out = np.zeros(len(taken)), np.ones(len(taken))
        return Schedule(taken, alpha, alpha_prev, sigma, scale, scale_prev, skip, out, noise.prediction)

    @staticmethod
    def consistency(steps: int, noise: NoiseSpec = PUBLISHED) -> "Schedule":
        """Builds the multistep schedule of a latent consistency model (arXiv 2310.04378, algorithm 3).

        Every step predicts the clean latents; all but the last then add the full noise of the next timestep.
        """
        taken = consistency_timesteps(steps)
        alpha, scale = alpha_bar(noise)[taken], scales(noise)[taken]
        alpha_prev, scale_prev = np.append(1.0, alpha[:-1]), np.append(1.0, scale[:-1])
        scaled = TIMESTEP_SCALING * taken
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / np.sqrt(scaled**2 + SIGMA_DATA**2)
        sigma = np.sqrt(1 - alpha_prev)
        return Schedule(taken, alpha, alpha_prev, sigma, scale, scale_prev, skip, out, noise.prediction)

    @property
    def depth(self) -> int:
        """Returns how many predictions of earlier steps its sampler reads."""
        return 0 if self.sampler == DDIM else HISTORY

    def __len__(self) -> int:
        return len(self.timesteps)
