"""Few-step sampling: a latent consistency model's formulas, its defaults, and what it refuses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support.denoisers import Watched
from support.engines import engine_like
from vstar_engine import Sampling
from vstar_engine.commands.inspect import command_for
from vstar_engine.config import request_warnings
from vstar_engine.config.request import Request
from vstar_engine.sampling.ddim import sample
from vstar_engine.sampling.schedule import Schedule, consistency_timesteps

SHAPE = (1, 4, 3, 2, 2)
# float64, but the direction's share is the square root of what rounding leaves of 1 - a_prev - sigma^2
ROUNDING = 1e-7


def by_the_paper(steps, latents, noise, predict, rescaled):
    """Samples as arXiv 2310.04378 and the documentation of diffusers' LCMScheduler say; returns every step's answer too.

    With `rescaled`, the noisy latents of timestep t hold the finished ones times 1 - 0.3 t / 399, at least 0.7.
    """
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha = np.cumprod(1 - beta)
    teacher = [20 * k - 1 for k in range(50, 0, -1)]
    chosen = [teacher[int(np.floor(i * 50 / steps))] for i in range(steps)]
    answers = []
    for index, t in enumerate(chosen):
        scale = max(0.7, 1 - 0.3 * t / 399) if rescaled else 1.0
        clean = (latents - np.sqrt(1 - alpha[t]) * predict(latents, t)) / (np.sqrt(alpha[t]) * scale)
        c_skip = 0.5**2 / ((10 * t) ** 2 + 0.5**2)
        c_out = (10 * t) / ((10 * t) ** 2 + 0.5**2) ** 0.5
        answers.append(c_out * clean + c_skip * latents)
        latents = answers[-1]
        if index + 1 < steps:
            after = chosen[index + 1]
            scale = max(0.7, 1 - 0.3 * after / 399) if rescaled else 1.0
            latents = np.sqrt(alpha[after]) * scale * answers[-1] + np.sqrt(1 - alpha[after]) * noise[index]
    return latents, answers


def without_rescale(schedule):
    ones = np.ones(len(schedule))
    return Schedule(**{**vars(schedule), "scale": ones, "scale_prev": ones})


@pytest.mark.parametrize("rescaled", [True, False], ids=["rescaled", "plain"])
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 50])
def test_samples_as_the_paper_says(steps, rescaled):
    generator = torch.Generator().manual_seed(steps)
    first = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    tape = torch.randn(steps, *SHAPE, generator=generator, dtype=torch.float64)
    schedule = Schedule.of(Sampling.few(steps=steps))
    schedule = schedule if rescaled else without_rescale(schedule)

    def predict(x, t):
        return 0.4 * x + 0.3 * np.sin(3 * x + 0.01 * t)

    def denoise(x, timestep, index):
        return torch.from_numpy(predict(x.numpy(), int(timestep[0]))), None

    *_, (_, _, last, answer) = sample(denoise, schedule, first, guidance=1.0, noise=tape)
    wanted, answers = by_the_paper(steps, first.numpy(), tape.numpy(), predict, rescaled)
    np.testing.assert_allclose(last.numpy(), wanted, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(answer.numpy(), answers[-1], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize(("steps", "wanted"), [(1, [999]), (2, [499, 999]), (4, [259, 499, 759, 999])])
def test_timesteps_are_spread_over_the_teachers(steps, wanted):
    assert consistency_timesteps(steps).tolist() == wanted


def test_every_number_of_steps_is_given_exactly():
    for steps in range(1, 51):
        timesteps = consistency_timesteps(steps)
        assert len(set(timesteps.tolist())) == steps
        assert (np.diff(timesteps) > 0).all()
        assert ((timesteps + 1) % 20 == 0).all()


def test_its_defaults_and_what_is_given_instead():
    assert Sampling.few() == Sampling(4, guidance=1.0, fast=("few-step",))
    assert Sampling.few(steps=8, guidance=2.0, fast=("guidance-interval",)).fast == ("few-step", "guidance-interval")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 51}, "few-step takes 1 to 50 steps, got 51"),
        ({"eta": 0.0}, "few-step draws fresh noise for every step, which is eta 1, got 0.0"),
        ({"fast": ("step-cache",)}, "step-cache does not compose with few-step"),
        ({"fast": ("guidance-interval",)}, "guidance-interval does not compose with guidance 1"),
    ],
    ids=["steps", "eta", "step-cache", "guidance-interval"],
)
def test_what_does_not_compose(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sampling.few(**settings)


def test_a_schedule_refuses_more_steps_than_the_teacher_had():
    with pytest.raises(ValueError, match="a consistency model takes 1 to 50 steps, got 51"):
        Schedule.consistency(51)


def test_the_engine_asks_for_one_branch_a_step_and_warns_once(mini, caplog):
    request_warnings.warn_once.cache_clear()
    engine_like(mini, loras=[SimpleNamespace(sha256="")]).begin([Request(("snow",), 3, sampling=Sampling.few())])
    assert "LoRA" not in caplog.text
    asked = []

    def seen(latents, timestep, *given):
        asked.append((len(latents), int(timestep[0])))

    watched = engine_like(mini, denoiser=Watched(mini.denoiser, seen))
    request = Request(("snow", "flowers"), 3, 1, (32, 64), Sampling.few())
    one, two = watched.run(request), watched.run(request)
    assert asked == [(1, 999), (1, 759), (1, 499), (1, 259)] * 2
    assert (one.frames == two.frames).all()
    assert caplog.text.count("few-step is for a consistency model, and no LoRA") == 1
    command = command_for(one.provenance)
    assert {"--fast=few-step", "--steps=4", "--guidance=1.0"} <= set(command.split())


def test_a_batch_walks_one_way(mini):
    requests = [Request(("snow",), 3, 1, (32, 64), sampling) for sampling in (Sampling.few(), Sampling(4))]
    with pytest.raises(ValueError, match=r"share frames, size and steps, .*'few-step'"):
        mini.begin(requests)
