"""The published enhancer's solver, on a recorded run with a stand-in network and given cuts."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from vstar_engine.networks.blended import window_starts
from vstar_engine.sampling.enhancer import DpmSolver2mSde, EnhancerSchedule, clean_from_velocity, rescaled
from vstar_engine.verification.case import relative_error, tolerance
from vstar_engine.verification.golden import Golden

STREAMING = Golden(GOLDEN.parent / "golden_streaming")
CASES = [case for case in STREAMING.cases if case["kind"] == "blend_x0"]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_recorded_walk(case):
    config, given = case["config"], {name: torch.as_tensor(value) for name, value in STREAMING.inputs(case).items()}
    schedule = EnhancerSchedule.published()
    ratios = schedule.ratios(config["steps"], config["total_noise_levels"])
    times = np.rint(schedule.times(ratios)).astype(int)
    alphas, sigmas = schedule.alphas, schedule.sigmas
    starts, width = window_starts(config["frames"], config["window"], config["overlap"]), config["window"]
    assert starts == given["window_starts"].tolist()

    def network(x, y, t):
        place = torch.arange(width)[:, None, None] / width - 0.5
        return 0.55 * x + 0.25 * x.mean(dim=2, keepdim=True) + 0.3 * place * x.roll(1, dims=1) + y + 1e-4 * t

    top = config["total_noise_levels"] - 1
    start = float(alphas[top]) * given["latent"] + float(sigmas[top]) * given["start_noise"]
    assert relative_error(start, given["noised_start"]) < tolerance(case, "noised_start")
    x, solver = start * float(sigmas[top] / alphas[top]), DpmSolver2mSde(ratios)
    for index, (ratio, t) in enumerate(zip(ratios[:-1], times, strict=True)):
        seen = x / float((1 + ratio**2) ** 0.5)
        clean = torch.full_like(x, float("nan"))
        for start, cut in zip(starts, [0, *given["cuts"][index].tolist()], strict=True):
            part = seen[:, :, start : start + width]
            cond, uncond = (network(part, given[name], int(t)) for name in ("y_positive", "y_negative"))
            velocity = rescaled(uncond + config["guidance"] * (cond - uncond), cond, config["guidance_rescale"])
            made = clean_from_velocity(part, velocity, float(alphas[t]), float(sigmas[t]))
            clean[:, :, start + cut : start + width] = made[:, :, cut:]
        last = index == config["steps"] - 1
        x = solver.step(index, x, clean, None if last else given["solver_noise"][index])
    assert relative_error(x, given["out"]) < tolerance(case, "out")


def test_a_step_needs_its_noise():
    with pytest.raises(ValueError, match="was given none"):
        DpmSolver2mSde(np.array([2.0, 1.0, 0.0])).step(0, torch.zeros(1), torch.zeros(1))
