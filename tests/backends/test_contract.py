"""What every back end keeps to, whichever library runs the network: one call, one meaning of its arguments, one protocol."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from support import fake_tensorrt
from support.accuracy import assert_as_accurate, relative_error
from vstar_engine.backends import backend_named, tensorrt
from vstar_engine.backends.inputs import full
from vstar_engine.config.models import MODELS
from vstar_engine.kernels.guided_step import guided_step
from vstar_engine.networks.denoiser import Denoiser
from vstar_engine.networks.precomputed import CachedFeatures
from vstar_engine.networks.step import Conditioning, NetworkCall, SamplingStep, StepInputs
from vstar_engine.sampling.ddim import coefficients
from vstar_engine.sampling.schedule import Schedule
from vstar_engine.weights import checkpoint

SPEC = MODELS["mini"]
CPU, NAMES = torch.device("cpu"), ("latents", "timestep", "context", "fps", "tar")
BACKENDS = ("eager", "onnxruntime", "inductor", "tensorrt")
# what a product over other rows, summed in another order, may differ by in float32
SAME = 1e-4


class Case(NamedTuple):
    """A back end's denoiser, the same network in eager, and in float64."""

    name: str
    denoiser: Denoiser
    eager: Callable
    exact: Callable


def stand_in(*given):
    """The network of the stand-in for TensorRT, by definition."""
    return fake_tensorrt.computed(**full(*given))


@pytest.fixture(scope="module", params=BACKENDS)
def case(request, mini, mini_weights):
    """The mini model in each back end; TensorRT is a stand-in that computes another network."""
    name = request.param
    if name == "tensorrt":
        pytest.importorskip("triton", reason="needs Triton")
        library = SimpleNamespace(ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensorrt, "stream_of", lambda device: 0)
            yield Case(name, tensorrt.TensorrtUnet(library, fake_tensorrt.Running(), CPU, torch.float32), stand_in, stand_in)
        return
    exact = backend_named("eager").load(SPEC, checkpoint.Weights(mini_weights), device=CPU, dtype=torch.float64)
    if name == "eager":
        yield Case(name, mini.denoiser, mini.denoiser, exact)
        return
    engine = request.getfixturevalue({"onnxruntime": "onnx_engine", "inductor": "inductor_engine"}[name])
    yield Case(name, backend_named(name).load(engine, device=CPU, dtype=torch.float32), mini.denoiser, exact)


def inputs(batch, frames, tar=True):
    """Every item of the batch has its own timestep, context, frame rate and rows of tar."""
    generator = torch.Generator().manual_seed(batch + 10 * frames)
    rows = torch.rand(batch, SPEC.unet.levels, frames, generator=generator)
    return (
        torch.randn(batch, 4, frames, 4, 8, generator=generator),
        torch.randint(0, 1000, (batch, 1), generator=generator),
        torch.randn(batch, frames, 77, SPEC.unet.context_dim, generator=generator),
        torch.randint(8, 30, (batch,), generator=generator),
        rows if tar else torch.zeros_like(rows),
    )


def assert_accurate(case, given):
    latents, timestep, context, fps, tar = given
    ours = case.denoiser(*given)
    assert ours.is_contiguous()
    assert_as_accurate(ours, case.eager(*given), case.exact(latents.double(), timestep, context.double(), fps, tar))


@pytest.mark.parametrize("tar", [True, False], ids=["tar", "plain"])
@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (1, 16), (2, 3), (2, 17)], ids=str)
@torch.inference_mode()
def test_it_is_as_accurate_as_eager_at_every_length(case, batch, frames, tar):
    assert_accurate(case, inputs(batch, frames, tar))


@pytest.mark.parametrize(("texts", "videos"), [(2, 1), (2, 2), (3, 1)], ids=str)
@torch.inference_mode()
def test_a_video_may_have_several_texts(case, texts, videos):
    latents, timestep, context, fps, tar = inputs(texts * videos, 5)
    assert_accurate(case, (latents[:videos], timestep[:videos], context, fps[:videos], tar[:videos]))


@torch.inference_mode()
def test_a_shared_row_is_its_repetition(case):
    latents, timestep, context, fps, tar = inputs(2, 5)
    shared = case.denoiser(latents, timestep, context[:, :1], fps, tar[:1])
    repeated = (timestep.expand(-1, 5), context[:, :1].expand(-1, 5, -1, -1), fps, tar[:1].expand(2, -1, -1))
    assert relative_error(shared, case.denoiser(latents, *repeated)) < SAME


@torch.inference_mode()
def test_arguments_have_names_and_are_not_written(case):
    given = inputs(2, 3)
    before = [x.clone() for x in given]
    assert torch.equal(case.denoiser(**dict(zip(NAMES, given, strict=True))), case.denoiser(*given))
    assert all(map(torch.equal, given, before))


@torch.inference_mode()
def test_the_result_is_the_callers_own(case):
    made = [(case.denoiser(*given), given) for given in (inputs(2, frames) for frames in (3, 3, 5, 3))]
    kept = [noise.clone() for noise, _ in made]
    for noise, _ in made:
        noise.zero_()
    assert all(torch.equal(case.denoiser(*given), copy) for (_, given), copy in zip(made, kept, strict=True))


@torch.inference_mode()
def test_texts_that_are_no_multiple_of_videos_are_refused(case):
    latents, timestep, context, fps, tar = inputs(3, 3)
    with pytest.raises(ValueError, match="as many rows as latents, 2, or a multiple, got 3"):
        case.denoiser(latents[:2], timestep[:2], context, fps[:2], tar[:2])


@torch.inference_mode()
def test_a_dense_tar_is_for_eager(case):
    latents, timestep, context, fps, tar = inputs(1, 3)
    given = (latents, timestep, context, fps, tar[..., None].expand(-1, -1, -1, 3))
    if case.name == "eager":
        assert case.denoiser(*given).shape == latents.shape
    else:
        with pytest.raises(ValueError, match=r"takes tar as \(1 or B, levels, T\), got .*; a dense one runs in eager"):
            case.denoiser(*given)


@torch.inference_mode()
def test_what_is_prepared_once_gives_what_is_given_each_time(case):
    latents, _, context, fps, tar = inputs(2, 5)
    prepared = case.denoiser.prepare_context(context[:1], context[1:, :1])
    table = case.denoiser.timestep_table(torch.tensor([901, 481, 1]), fps)
    assert len(table.rows) == 3
    ours = case.denoiser(latents, table.embedding(table.rows[1]), prepared, fps, tar)
    plain = torch.cat([context[:1], context[1:, :1].expand(-1, 5, -1, -1)])
    assert relative_error(ours, case.denoiser(latents, torch.full((2, 1), 481), plain, fps, tar)) < SAME


@torch.inference_mode()
def test_a_step_is_its_calls_guided(case):
    """Of two videos, of which the second has no unconditional branch; the branches in one call, and in two."""
    latents, _, context, fps, tar = inputs(2, 3)
    uncond, plain, noise = 1 - context[:1], torch.tensor([2, 1]), torch.randn(latents.shape)
    table = case.denoiser.timestep_table(torch.tensor([481]), fps)
    weights = coefficients(Schedule.ddim(5), torch.tensor([12.0, 1.0]))[2].float()
    given = StepInputs(latents, table.rows[0], fps, tar, weights, noise, plain)
    contexts = (*context.split(1), uncond)
    apart = (NetworkCall((0, 1), Conditioning(contexts[:2])), NetworkCall((0,), Conditioning(contexts[2:])))
    rows, timestep = [0, 1, 0], torch.full((3, 1), 481)
    eps = case.denoiser(latents[rows], timestep, torch.cat(contexts), fps[rows], tar[rows])
    wanted = guided_step(latents, eps, plain, weights, noise)
    for calls in ((NetworkCall((0, 1, 0), Conditioning(contexts)),), apart):
        found = case.denoiser.run_step(SamplingStep(torch.float32, table, calls, given))
        assert len(found) == 2
        assert all(relative_error(ours, theirs) < SAME for ours, theirs in zip(found, wanted, strict=True))


@torch.inference_mode()
def test_a_network_that_only_runs_whole_says_so(case):
    cached = CachedFeatures(2)
    if case.name == "eager":
        assert torch.equal(case.denoiser.predict_cached(inputs(1, 3), cached), case.denoiser(*inputs(1, 3)))
        assert cached.features is not None
    else:
        with pytest.raises(ValueError, match="only runs whole: step caching needs eager PyTorch"):
            case.denoiser.predict_cached(inputs(1, 3), cached)


def test_what_is_not_recorded_keeps_no_graphs(case):
    """On a GPU eager records its steps: `test_graphs.py`."""
    assert not case.denoiser.records_steps
    assert case.denoiser.graph_bytes() == 0
    assert not case.denoiser.forget_graphs()
    assert (case.denoiser.module is None) == (case.name != "eager")
