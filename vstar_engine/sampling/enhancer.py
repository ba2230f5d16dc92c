"""The noise schedule and solver of StreamingT2V's published enhancer (arXiv 2403.14773): DPM-Solver++(2M) SDE in k-space."""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

LEVELS = 1000
# log of the signal-to-noise ratio's limit, and the two resolutions' noise shifts that it is interpolated between
LOG_SNR, FINE, COARSE = 15.0, 2.0, 4.0
# levels that an upscaled video is noised to: the cleaner part of all
NOISED = 600
RESCALE = 0.2


@dataclass(frozen=True)
class EnhancerSchedule:
    """The noise levels, (1000,) float64 from the cleanest: sigma^2 + alpha^2 = 1, and the last alpha is 0."""

    sigmas: np.ndarray

    @property
    def alphas(self) -> np.ndarray:
        return np.sqrt(1 - self.sigmas**2)

    @staticmethod
    def published(
        levels: int = LEVELS,
        fine: float = FINE,
        coarse: float = COARSE,
        clamp: float = LOG_SNR,
        zero_terminal: bool = True,
    ) -> "EnhancerSchedule":
        """Interpolates two shifted cosine schedules in log-SNR, then stretches the sigmas so that the last is 1."""
        share = np.linspace(1.0, 0.0, levels)
        clean, noisy = math.atan(math.exp(clamp / 2)), math.atan(math.exp(-clamp / 2))
        angle = clean + share * (noisy - clean)
        shifted = [-2 * np.log(np.tan(angle)) + 2 * math.log(1 / scale) for scale in (fine, coarse)]
        log_snr = share * shifted[0] + (1 - share) * shifted[1]
        sigmas = np.sqrt(1 / (1 + np.exp(log_snr)))
        if zero_terminal:
            first, most = sigmas.min(), sigmas.max()
            sigmas = first + (sigmas - first) * (1 - first) / (most - first)
        return EnhancerSchedule(sigmas)

    def ratios(self, steps: int, noised: int = NOISED) -> np.ndarray:
        """Returns sigma/alpha before each of `steps` steps and 0 after the last, (steps + 1,) float64."""
        places = noised - 1 - np.arange(steps + 1) * noised / (steps + 1)
        log = np.log(self.sigmas[:noised] / self.alphas[:noised])
        below = np.floor(places).astype(int)
        above = np.minimum(below + 1, noised - 1)
        weight = places - below
        return np.append(np.exp((1 - weight) * log[below] + weight * log[above])[:-1], 0.0)

    def times(self, ratios: np.ndarray) -> np.ndarray:
        """Returns the fractional level of each ratio above 0, by interpolation of its logarithm."""
        log = np.log(self.sigmas[:-1] / self.alphas[:-1])
        return np.interp(np.log(ratios[ratios > 0]), log, np.arange(len(log)))


def clean_from_velocity(latents: Tensor, velocity: Tensor, alpha: float, sigma: float) -> Tensor:
    """Returns the clean latents that a predicted velocity v = alpha * noise - sigma * clean means."""
    return alpha * latents - sigma * velocity


def rescaled(guided: Tensor, cond: Tensor, share: float = RESCALE) -> Tensor:
    """Pulls a guided prediction (B, ...) towards the deviation of the conditional one, over all that a window has."""
    axes = tuple(range(1, guided.dim()))
    ratio = cond.std(dim=axes, keepdim=True) / (guided.std(dim=axes, keepdim=True) + 1e-12)
    return guided * (share * ratio + 1 - share)


@dataclass
class DpmSolver2mSde:
    """DPM-Solver++(2M) SDE (arXiv 2211.01095), the midpoint form with eta 1; it remembers the last step."""

    ratios: np.ndarray
    before: Tensor | None = None

    def step(self, index: int, latents: Tensor, clean: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns the latents in k-space after step `index` for the predicted clean ones; the last step takes no noise."""
        now, then = (float(k) for k in self.ratios[index : index + 2])
        if then == 0:
            return clean
        h = math.log(now / then)
        gone = -math.expm1(-2 * h)
        out = then / now * math.exp(-h) * latents + gone * clean
        if self.before is not None:
            h_before = math.log(float(self.ratios[index - 1]) / now)
            out = out + 0.5 * gone * (h / h_before) * (clean - self.before)
        self.before = clean
        if noise is None:
            raise ValueError(f"step {index} adds noise and was given none")
        return out + then * math.sqrt(gone) * noise
