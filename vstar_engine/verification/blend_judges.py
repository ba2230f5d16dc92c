"""Judges golden cases of StreamingT2V's randomized blending: merged predictions, the rule of the cut, and warp error."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vstar_engine.analysis.metrics.mawe import mawe, splat
from vstar_engine.config.windows import PAPER, RANDOMIZED, WindowPlan
from vstar_engine.kernels.guided_step import guided_step
from vstar_engine.sampling.window_merge import WindowMerge, earlier_probability

from .case import Judge

# the enhancer's schedule: log-SNR interpolated between two shifted cosines, mapped to end in pure noise
LEVELS, SHIFTS, LEAST_LOG_SNR = 1000, (2.0, 4.0), 7.5


class Steps(NamedTuple):
    """The steps of the enhancer: integer times, the alpha and sigma of these, and k = sigma / alpha with a last 0."""

    times: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    k: np.ndarray
    first_alpha: float
    first_sigma: float


def enhancer_steps(steps: int, levels: int) -> Steps:
    """Returns the steps from noise level `levels` - 1 down."""
    u = np.linspace(1.0, 0.0, LEVELS)
    low, high = np.arctan(np.exp(LEAST_LOG_SNR)), np.arctan(np.exp(-LEAST_LOG_SNR))
    angle = low + u * (high - low)
    log_snr = [-2 * np.log(np.tan(angle)) + 2 * np.log(1 / shift) for shift in SHIFTS]
    sigma = np.sqrt(1 / (1 + np.exp(u * log_snr[0] + (1 - u) * log_snr[1])))
    least, most = sigma.min(), sigma.max()
    sigma = least + (sigma - least) * (1 - least) / (most - least)
    alpha = np.sqrt(np.maximum(1 - sigma**2, 0.0))
    # in the index of the level
    place = levels - 1 - np.arange(steps) * levels / (steps + 1)
    log_k = np.log(sigma[:levels] / alpha[:levels])
    k = np.exp(np.interp(place, np.arange(levels), log_k))
    times = np.rint(place).astype(int)
    return Steps(times, alpha[times], sigma[times], np.append(k, 0.0), alpha[levels - 1], sigma[levels - 1])


def _stand_in(x: Tensor, added: Tensor, time: int) -> Tensor:
    """Predicts a window as the stand-in network of these cases, which tells a frame's place in its window."""
    length = x.shape[2]
    place = 0.3 * (torch.arange(length, device=x.device, dtype=x.dtype)[:, None, None] / length - 0.5)
    return 0.55 * x + 0.25 * x.mean(dim=2, keepdim=True) + place * x.roll(1, dims=1) + added + 1e-4 * time


def _merged(judge: Judge, index: int, made: Callable[[int, slice], Tensor]) -> Tensor:
    """Merges what `made` returns for each window and its frames, by the cuts that the case recorded."""
    config = judge.case["config"]
    plan = WindowPlan(config["frames"], config["window"], config["overlap"])
    merge = WindowMerge(plan.frames, plan.blend)
    for window, (start, cut) in enumerate(zip(plan.starts, [0, *judge.array("cuts")[index].tolist()], strict=True)):
        merge.add(start, made(window, slice(start, start + plan.window)), cut)
    return merge.result()


def _blend_x0(judge: Judge) -> None:
    config = judge.case["config"]
    steps = enhancer_steps(config["steps"], config["total_noise_levels"])
    plan = WindowPlan(config["frames"], config["window"], config["overlap"])
    judge.exact(plan.starts, "window_starts")
    noised = steps.first_alpha * judge.tensor("latent") + steps.first_sigma * judge.tensor("start_noise")
    judge.compare(noised, "noised_start")
    x, before, width_before, kept = noised * steps.k[0], None, 0.0, []
    for i in range(config["steps"]):
        given = x / np.sqrt(1 + steps.k[i] ** 2)

        def clean(window: int, frames: slice, given: Tensor = given, i: int = i) -> Tensor:
            part, time = given[:, :, frames], int(steps.times[i])
            cond, uncond = (_stand_in(part, judge.tensor(f"y_{name}"), time) for name in ("positive", "negative"))
            v = uncond + config["guidance"] * (cond - uncond)
            axes, share = tuple(range(1, v.dim())), config["guidance_rescale"]
            ratio = cond.std(axes, keepdim=True) / (v.std(axes, keepdim=True) + 1e-12)
            return steps.alpha[i] * part - steps.sigma[i] * (v * (share * ratio + 1 - share))

        x0 = _merged(judge, i, clean)
        if i in (0, 1, config["steps"] - 1):
            kept.append(x0)
        if steps.k[i + 1] == 0:
            x = x0
            break
        width = np.log(steps.k[i]) - np.log(steps.k[i + 1])
        moved = 1 - np.exp(-2 * width)
        x = steps.k[i + 1] / steps.k[i] * np.exp(-width) * x + moved * x0
        if before is not None:
            x = x + 0.5 * moved * width / width_before * (x0 - before)
        x = x + steps.k[i + 1] * np.sqrt(moved) * judge.tensor("solver_noise")[i]
        before, width_before = x0, width
    judge.compare(torch.stack(kept), "x0_blended")
    judge.compare(x, "out")


def _blend_xprev(judge: Judge) -> None:
    config, times = judge.case["config"], judge.array("timesteps").tolist()
    alpha = judge.array("alphas_cumprod_at").astype(np.float64)
    x = np.sqrt(alpha[0]) * judge.tensor("latent") + np.sqrt(1 - alpha[0]) * judge.tensor("noise")
    judge.compare(x, "start")
    negative, positive = judge.tensor("y").split(1)
    images = judge.tensor("image")
    plain = torch.ones(1, dtype=torch.int64, device=x.device)
    for i, (time, now, after) in enumerate(zip(times, alpha, [*alpha[1:], 1.0], strict=True)):
        numbers = [config["guidance"], np.sqrt(1 - now), now**-0.5, 1.0, 0.0, np.sqrt(after), np.sqrt(1 - after), 0.0]
        row = torch.tensor([numbers], device=x.device, dtype=x.dtype)

        def stepped(window: int, frames: slice, x: Tensor = x, time: int = time, row: Tensor = row) -> Tensor:
            part = x[:, :, frames].contiguous()
            both = torch.cat([_stand_in(part, y + images[window], time) for y in (positive, negative)])
            return guided_step(part, both, plain, row, torch.zeros_like(part))[0]

        x = _merged(judge, i, stepped)
    judge.compare(x, "out")


def _overlap_probability(judge: Judge) -> None:
    for overlap in judge.case["config"]["overlaps"]:
        for name, blend in (("code", RANDOMIZED), ("paper", PAPER)):
            judge.compare(earlier_probability(blend, overlap), f"{name}_{overlap}")


def _mawe(judge: Judge) -> None:
    frames, flows = np.moveaxis(judge.array("video"), 1, -1), judge.array("flows")
    moved = [splat(frame, flow) for frame, flow in zip(frames[:-1], flows, strict=True)]
    judge.compare(np.stack([np.moveaxis(warped, -1, 0) for warped, _ in moved]), "warped")
    judge.exact(np.stack([~filled for _, filled in moved]), "occluded")
    measured = mawe(frames, flows)
    judge.compare(measured.errors, "warp_error")
    judge.compare(measured.motions, "mean_flow")
    judge.compare([measured.mean_of_ratios], "mean_of_ratios")
    judge.compare([measured.ratio_of_means], "ratio_of_means")


BLEND_KINDS: dict[str, Callable[[Judge], None]] = {
    "blend_x0": _blend_x0,
    "blend_xprev": _blend_xprev,
    "overlap_probability": _overlap_probability,
    "mawe": _mawe,
}
