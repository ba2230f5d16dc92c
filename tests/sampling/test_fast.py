"""What may change a video a little to make it sooner: refused where it makes no sense, and done where it is asked for."""

import pytest
import torch

from support.denoisers import Watched
from vstar_engine import Sampling
from vstar_engine.config.models import MODELS
from vstar_engine.config.request import Request
from vstar_engine.sampling.batch import Batch, BatchRow

SPEC = MODELS["mini"]


def test_nothing_is_fast_by_default():
    assert Sampling().fast == ()
    assert all(Sampling().guided(index) for index in range(25))
    assert not Sampling(guidance=1.0).guided(0)


@pytest.mark.parametrize(("steps", "guided"), [(25, 15), (10, 6), (3, 2), (1, 1)])
def test_guidance_ends_after_three_fifths_of_the_steps(steps, guided):
    sampling = Sampling(steps, fast=("guidance-interval",))
    assert [sampling.guided(index) for index in range(steps)] == [True] * guided + [False] * (steps - guided)


def test_bad_names_and_what_does_not_compose():
    with pytest.raises(ValueError, match=r"some of guidance-interval, step-cache, few-step, fp8, got 'warp', ''$"):
        Sampling(fast=("warp", ""))
    with pytest.raises(ValueError, match=r"a tuple of names, such as \('step-cache',\), got the string 'step-cache'$"):
        Sampling(fast="step-cache")
    with pytest.raises(ValueError, match="does not compose with guidance 1"):
        Sampling(guidance=1.0, fast=("guidance-interval",))


@pytest.mark.parametrize("batched", [True, False])
def test_steps_without_guidance_ask_for_one_branch(batched):
    asked = []

    def zeros(latents, timestep, context, fps, tar):
        return latents.new_zeros(len(context), *latents.shape[1:])

    sampling = Sampling(5, batch_guidance=batched, fast=("guidance-interval",))
    request = Request(("a",), frames=2, size=(32, 32), sampling=sampling)
    row = BatchRow.of(0, request, None, torch.zeros(1, 2, 77, 64), torch.zeros(1, 1, 77, 64), SPEC)
    batch = Batch(Watched(zeros, lambda *given: asked.append(len(given[2]))), SPEC, torch.float32, [row])
    for _ in range(5):
        batch.step()
    assert asked == ([2, 2, 2, 1, 1] if batched else [1] * 8)
