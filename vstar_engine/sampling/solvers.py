"""Multistep solvers as rows of coefficients over the clean latents that the last steps predicted.

DPM-Solver++ 2M and its stochastic form (arXiv 2211.01095), UniPC of second order (2302.04867). They work with any
x = alpha x0 + sigma e, so the dynamic rescale is a part of alpha = sqrt(alpha_bar) scale; lambda = ln(alpha / sigma). Since
x = alpha x0 + sigma e, each update is a sum over x0, e, fresh noise and the x0 of earlier steps, and DDIM at eta 0 is its first
order.
"""

from dataclasses import dataclass

import numpy as np

from vstar_engine.config.sampling import DPM_SDE, UNIPC

from .schedule import Schedule


@dataclass(frozen=True)
class Nodes:
    """The points that a trajectory passes, the noisiest first, (steps + 1,) float64. A last sigma of 0 has lambda infinity."""

    alpha: np.ndarray
    sigma: np.ndarray

    @staticmethod
    def of(schedule: Schedule, start: int = 0) -> "Nodes":
        """Returns the points of a schedule without its `start` noisiest."""
        alpha_bar = np.append(schedule.alpha[::-1], schedule.alpha_prev[0])[start:]
        scale = np.append(schedule.scale[::-1], schedule.scale_prev[0])[start:]
        return Nodes(np.sqrt(alpha_bar) * scale, np.sqrt(1 - alpha_bar))

    @property
    def steps(self) -> int:
        return len(self.alpha) - 1

    def width(self, step: int) -> float:
        """Returns the step's length in lambda."""
        with np.errstate(divide="ignore"):
            after, before = np.log(self.alpha[[step + 1, step]]) - np.log(self.sigma[[step + 1, step]])
        return float(after - before)


def columns(schedule: Schedule, start: int = 0) -> np.ndarray:
    """Returns kept, direction and sigma of `guided_step`, then the weights of the last HISTORY x0, the newest first.

    (steps, 3 + HISTORY) float64, the noisiest step first, without the `start` noisiest, before which there is no history.
    """
    nodes = Nodes.of(schedule, start)
    update = _unipc if schedule.sampler == UNIPC else _dpm
    return np.stack([update(nodes, step, schedule.sampler) for step in range(nodes.steps)])


def _dpm(nodes: Nodes, step: int, sampler: str) -> np.ndarray:
    """Returns a step of DPM-Solver++ 2M (algorithm 2 of arXiv 2211.01095, the midpoint form), or of its stochastic form."""
    alpha, sigma, width = nodes.alpha[step + 1], nodes.sigma[step + 1], nodes.width(step)
    # the share of the old noise that stays, and the noise that replaces the rest
    stays, fresh = (np.exp(-width), np.sqrt(-np.expm1(-2 * width))) if sampler == DPM_SDE else (1.0, 0.0)
    curve = 0.0
    if _order(nodes, step) == 2:
        curve = 0.5 * alpha * -np.expm1(-width * (2 if sampler == DPM_SDE else 1)) * width / nodes.width(step - 1)
    return np.array([alpha + curve, sigma * stays, sigma * fresh, -curve, 0.0])


def _unipc(nodes: Nodes, step: int, sampler: str) -> np.ndarray:
    """Returns a step of UniPC: the latents corrected by this step's prediction, then the next ones predicted from them.

    Of second order with B(h) = e^h - 1. The correction needs no latents of the step before:
    corrector and predictor begin at the same ones, so their difference is a sum of x0.
    """
    alpha, sigma = nodes.alpha[step + 1], nodes.sigma[step + 1]
    now, before, earlier = (sigma / nodes.sigma[step] * change for change in _correction(nodes, step))
    curve = 0.0
    if _order(nodes, step) == 2:
        curve = 0.5 * alpha * -np.expm1(-nodes.width(step)) * nodes.width(step) / nodes.width(step - 1)
    return np.array([alpha + now + curve, sigma, 0.0, before - curve, earlier])


def _order(nodes: Nodes, step: int) -> int:
    """Returns 2, and 1 at both ends: without history, and over the last step, which is too long in lambda to extrapolate."""
    return min(2, step + 1, nodes.steps - step)


def _correction(nodes: Nodes, step: int) -> tuple[float, float, float]:
    """Returns corrected less predicted latents of a step, as weights of its x0 and of those of the two steps before."""
    if step == 0:
        return 0.0, 0.0, 0.0
    width = nodes.width(step - 1)
    whole = nodes.alpha[step] * -np.expm1(-width)
    if _order(nodes, step - 1) == 1:
        return 0.5 * whole, -0.5 * whole, 0.0
    ratio = -nodes.width(step - 2) / width
    # the conditions of second order of the paper's theorem 3.1
    first = np.expm1(-width) / -width - 1
    second = first / -width - 0.5
    conditions = np.array([first, 2 * second]) / np.expm1(-width)
    past, here = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], conditions)
    # the predictor's own weight of the difference is 0.5
    bend = (past - 0.5) / ratio
    return whole * here, -whole * (here + bend), whole * bend
