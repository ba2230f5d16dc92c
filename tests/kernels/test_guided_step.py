"""Guidance and the update against their formula, each video by its own settings, and what the op refuses."""

import pytest
import torch

from vstar_engine.kernels.guided_step import COEFFICIENTS, guided_step, guided_step_ref
from vstar_engine.sampling.ddim import coefficients
from vstar_engine.sampling.schedule import Schedule

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def arguments(*shape: int) -> list[torch.Tensor]:
    """A step of videos of which the last has no guidance."""
    videos = shape[0]
    plain = torch.tensor([*range(videos, 2 * videos - 1), videos - 1])
    eps, weights = torch.randn(2 * videos, *shape[1:]), torch.rand(videos, len(COEFFICIENTS))
    return [torch.randn(shape), eps, plain, weights, torch.randn(shape)]


def wide(given: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.double() if x.is_floating_point() else x for x in given]


@pytest.mark.parametrize("i", range(7))
def test_a_step_is_the_formula_of_each_video(i):
    """arXiv 2010.02502, eq. 12, with guidance and the rescale, written out in float64."""
    schedule, guidance = Schedule.ddim(7, eta=0.6), torch.tensor([4.0, -1.5, 9.0])
    x, eps, plain, _, noise = wide(arguments(3, 4, 5))
    after, finished = guided_step(x, eps, plain, coefficients(schedule, guidance)[6 - i], noise)
    a, a_prev, sigma = (float(getattr(schedule, name)[i]) for name in ("alpha", "alpha_prev", "sigma"))
    for video in range(3):
        cond, uncond = eps[video], eps[3 + video]
        e = cond if video == 2 else uncond + guidance[video] * (cond - uncond)
        clean = (x[video] - (1 - a) ** 0.5 * e) / a**0.5 / float(schedule.scale[i])
        direction = (1 - a_prev - sigma**2) ** 0.5 * e
        torch.testing.assert_close(finished[video], clean)
        wanted = a_prev**0.5 * float(schedule.scale_prev[i]) * clean + direction + sigma * noise[video]
        torch.testing.assert_close(after[video], wanted)


def test_a_video_without_guidance_takes_its_prediction_to_the_bit():
    x, eps, _, weights, noise = arguments(2, 3, 4)
    alone = guided_step(x, eps, torch.arange(2), weights, noise)
    weights[:, 0] = 1e4
    assert all(map(torch.equal, guided_step(x, eps, torch.arange(2), weights, noise), alone))


def test_a_history_adds_its_clean_latents_by_their_weights():
    x, eps, plain, weights, noise = arguments(2, 3, 4)
    history, past = torch.randn(2, 3, 3, 4), torch.rand(2, 3)
    after, clean = guided_step(x, eps, plain, weights, noise)
    ours = guided_step(x, eps, plain, torch.cat([weights, past], dim=1), noise, history)
    torch.testing.assert_close(ours[0], after + torch.einsum("bk,bk...->b...", past, history))
    assert torch.equal(ours[1], clean)
    zeros = guided_step(x, eps, plain, torch.cat([weights, 0 * past], dim=1), noise, history)
    assert all(map(torch.equal, zeros, (after, clean)))


def test_predictions_may_be_in_half_precision():
    x, eps, plain, weights, noise = arguments(2, 3, 4)
    half, single = (guided_step(x, given, plain, weights, noise) for given in (eps.half(), eps.half().float()))
    assert all(map(torch.equal, half, single))


def test_gradients_pass():
    x, eps, plain, weights, noise = wide(arguments(2, 3, 4))
    leaves = [leaf.requires_grad_() for leaf in (x, eps, noise)]
    assert torch.autograd.gradcheck(lambda x, eps, noise: guided_step(x, eps, plain, weights, noise), leaves)


def test_the_op_is_registered_as_torch_expects():
    x, eps, plain, weights, noise = arguments(2, 3, 4)
    remembering = [x, eps, plain, torch.cat([weights, weights[:, :2]], dim=1), noise, torch.randn(2, 2, 3, 4)]
    for given in (arguments(2, 3, 4), remembering):
        torch.library.opcheck(torch.ops.vstar.guided_step, given, test_utils=("test_schema", "test_faketensor"))


def test_a_compiler_sees_standard_operators():
    class Net(torch.nn.Module):
        def forward(self, *given):
            return guided_step(*given)

    given = arguments(2, 3, 4)
    exported = torch.export.export(Net(), tuple(given))
    assert not [node for node in exported.graph.nodes if "vstar" in str(node.target)]
    for ours, theirs in zip(exported.module()(*given), guided_step_ref(*given), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (1, torch.ones(1, 3, 4), r"2 or more like the latents \(2, 3, 4\), got \(1, 3, 4\)"),
        (1, torch.ones(4, 3, 5), r"got \(4, 3, 5\)"),
        (2, torch.ones(2), r"plain must be \(2,\) torch.int64, got \(2,\) torch.float32"),
        (3, torch.ones(2, 7), r"\(2, 8\) torch.float32, got \(2, 7\)"),
        (3, torch.ones(2, 8).double(), r"got \(2, 8\) torch.float64"),
        (4, torch.ones(2, 3), r"noise must be \(2, 3, 4\) torch.float32, got \(2, 3\)"),
        (5, torch.ones(2, 1, 3, 4), r"coefficients must be \(2, 9\) torch.float32, got \(2, 8\)"),
        (
            5,
            torch.ones(2, 0, 3, 5),
            r"history must be .* like latents \(2, 3, 4\) torch.float32, got \(2, 0, 3, 5\)",
        ),
    ],
    ids=["few", "shape", "plain", "coefficients", "dtype", "noise", "depth", "history"],
)
def test_bad_input(place, value, words):
    given = [*arguments(2, 3, 4), None]
    given[place] = value
    with pytest.raises(ValueError, match=words):
        guided_step(*given)
