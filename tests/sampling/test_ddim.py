import pytest
import torch

from vstar_engine.sampling.ddim import sample
from vstar_engine.sampling.schedule import Schedule

SHAPE = (2, 4, 3, 2, 2)


def toy(latents, timestep, index):
    return 0.5 * latents + 0.1, 0.4 * latents


def last(**options):
    return list(sample(toy, Schedule.ddim(5), torch.ones(SHAPE), **options))[-1][2]


def test_guidance_has_a_batch_axis():
    noise = torch.randn(5, *SHAPE)
    mixed = last(guidance=torch.tensor([2.0, 7.0]), noise=noise)
    assert torch.equal(mixed[:1], last(guidance=2.0, noise=noise)[:1])
    assert torch.equal(mixed[1:], last(guidance=7.0, noise=noise)[1:])


def test_noise_as_a_tape_and_as_a_function_agree():
    noise = torch.randn(5, *SHAPE)
    assert torch.equal(last(guidance=3.0, noise=noise), last(guidance=3.0, noise=lambda index: noise[index]))


def test_without_noise_given_it_is_drawn():
    torch.manual_seed(1)
    first = last(guidance=3.0)
    assert not torch.equal(first, last(guidance=3.0))
    torch.manual_seed(1)
    assert torch.equal(first, last(guidance=3.0))


def test_yields_every_step_from_the_noisiest_and_counts_from_zero():
    steps = list(sample(toy, Schedule.ddim(5), torch.ones(SHAPE), guidance=1.0, start=2))
    assert [(index, timestep) for index, timestep, _, _ in steps] == [(0, 401), (1, 201), (2, 1)]


def test_bad_start():
    with pytest.raises(ValueError, match="start must be 0 to 4"):
        list(sample(toy, Schedule.ddim(5), torch.ones(SHAPE), guidance=1.0, start=5))
