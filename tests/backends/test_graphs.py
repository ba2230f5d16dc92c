"""Steps that replay CUDA graphs: to the bit what they are plainly. On a CPU over a stand-in, on a GPU over CUDA's own."""

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support import fake_graphs
from vstar_engine.analysis import attention_maps
from vstar_engine.backends.cuda_graphs import SHAPES, Recent, Recording, growing
from vstar_engine.backends.eager import RecordedUnet
from vstar_engine.bench.harness.random_networks import lay_out, seeded, step_inputs
from vstar_engine.bench.step.workload import TINY
from vstar_engine.networks.precomputed import CachedFeatures
from vstar_engine.networks.step import Conditioning, NetworkCall, SamplingStep, StepInputs
from vstar_engine.networks.unet import UNet
from vstar_engine.sampling.ddim import coefficients
from vstar_engine.sampling.schedule import Schedule

CPU = torch.device("cpu")
CUDA = pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)


@pytest.fixture(params=[CPU, CUDA], ids=str)
def device(request, monkeypatch):
    if request.param.type == "cpu":
        fake_graphs.install(monkeypatch)
    else:
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    return request.param


def networks(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[RecordedUnet, UNet]:
    """Two networks of the same weights: one that records and a plain one."""
    recorded, plain = (seeded(lambda kind=kind: kind(TINY.unet), device, dtype) for kind in (RecordedUnet, UNet))
    return lay_out(recorded, "channels_last"), lay_out(plain, "channels_last")


def step(
    unet: UNet,
    frames: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    conditioning: Conditioning | None = None,
    sampler: str = "ddim",
    **cached: Any,
) -> SamplingStep:
    """A guided step of one video; everything in it is another for another seed."""
    device = next(unet.parameters()).device
    latents, timestep, context, fps, tar = step_inputs(TINY, TINY.size, frames, device, dtype)
    timesteps = unet.timestep_table(timestep[0] - 40 * seed, fps + seed)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    schedule = replace(Schedule.ddim(5), sampler=sampler)
    weights = coefficients(schedule, torch.tensor([3.0 + seed]))[seed].float().to(device)
    history = torch.stack([noise + seed, noise - seed], dim=1) if schedule.depth else None
    latents, tar, plain = latents.float() + seed, tar * (1 - 0.2 * seed), torch.ones(1, dtype=torch.int64, device=device)
    inputs = StepInputs(latents, timesteps.rows[0], fps, tar, weights, noise, plain, history)
    conditioning = conditioning or Conditioning((context[:1] * (1 - 0.1 * seed), context[1:, :1] * (1 - 0.1 * seed)))
    return SamplingStep(dtype, timesteps, (NetworkCall((0,), conditioning, **cached),), inputs)


def equal(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_replayed_step_is_the_plain_one_to_the_bit(device, dtype, mode):
    """Plain, captured, and replayed with other values of everything; earlier results stay."""
    recorded, plain = networks(device, dtype)
    with mode():
        ours = [recorded.run_step(step(recorded, seed=seed, dtype=dtype)) for seed in (0, 1, 2, 3)]
        theirs = [plain.run_step(step(plain, seed=seed, dtype=dtype)) for seed in (0, 1, 2, 3)]
    assert all(map(equal, ours, theirs))
    assert not torch.equal(ours[2][0], ours[3][0])
    (fixed,) = recorded.recent.values()
    assert fixed.recording.graph is not None


@torch.inference_mode()
def test_a_step_with_a_history_has_a_recording_of_its_own(device):
    recorded, plain = networks(device)
    for seed in (0, 1, 2, 3):
        for sampler in ("unipc", "ddim", "dpm++2m-sde"):
            ours, theirs = (unet.run_step(step(unet, seed=seed, sampler=sampler)) for unet in (recorded, plain))
            assert equal(ours, theirs)
    # DDIM's, and one of both solvers
    assert len(recorded.recent) == 2


@torch.no_grad()
def test_texts_are_projected_where_others_are_heard(device, monkeypatch):
    recorded, plain = networks(device)
    projected, project = [], recorded.project_context
    monkeypatch.setattr(recorded, "project_context", lambda contexts: projected.append(len(contexts)) or project(contexts))
    own, other = (step(plain, seed=seed).calls[0].conditioning for seed in (0, 3))
    for seed, shown in enumerate([own, own, own, other, other, own]):
        mine = recorded.run_step(step(recorded, seed=seed % 5, conditioning=shown))
        assert equal(mine, plain.run_step(step(plain, seed=seed % 5, conditioning=Conditioning(shown.contexts))))
    assert projected == [2, 2, 2]


@torch.no_grad()
def test_steps_on_kept_features_are_recorded_too(device):
    """Whole steps give their features, and steps on features take whichever they are given."""
    recorded, plain = networks(device)
    stages, found = TINY.unet.num_res_blocks + 1, []
    for unet, run in ((recorded, recorded.run_step), (plain, plain.run_step)):
        kept = [run(step(unet, seed=seed, cached=CachedFeatures(stages))) for seed in (0, 1, 2)]
        cached = [run(step(unet, seed=seed, cached=CachedFeatures(stages, kept[seed][2]))) for seed in (2, 1, 0)]
        found.append([*kept, *cached])
    assert all(map(equal, *found))
    assert [len(made) for made in found[0]] == [3, 3, 3, 2, 2, 2]
    assert not torch.equal(found[0][3][0], found[0][4][0])
    whole, part = recorded.recent.values()
    assert None not in (whole.recording.graph, part.recording.graph)
    assert whole.kept.calls[0].conditioning is part.kept.calls[0].conditioning
    del whole, part
    recorded.forget_graphs()
    assert not recorded.conditionings


@torch.no_grad()
def test_every_shape_is_recorded_and_the_last_few_are_kept(device):
    recorded, plain = networks(device)
    for frames in [*range(1, SHAPES + 2)] * 2 + [SHAPES + 1] * 2:
        assert equal(recorded.run_step(step(recorded, frames, seed=1)), plain.run_step(step(plain, frames, seed=1)))
    assert len(recorded.recent) == SHAPES
    # one shape too many in turn, and none comes to its second run; the last came to three
    assert [fixed.recording.runs for fixed in recorded.recent.values()] == [1] * (SHAPES - 1) + [3]


@torch.no_grad()
def test_latents_in_any_layout_and_another_call_mode(device):
    """Buffers made under inference mode may be written outside it, and views are read as they are."""
    recorded, plain = networks(device)
    with torch.inference_mode():
        recorded.run_step(step(recorded))

    def strided(unet: UNet) -> SamplingStep:
        made = step(unet, seed=1)
        latents = made.inputs.latents.transpose(3, 4).contiguous().transpose(3, 4)
        return replace(made, inputs=made.inputs._replace(latents=latents))

    assert all(equal(recorded.run_step(strided(recorded)), plain.run_step(strided(plain))) for _ in range(3))


@torch.no_grad()
def test_only_the_second_run_of_a_shape_is_captured(graphs):
    recorded, _ = networks(CPU)
    counts = []
    for seed in range(4):
        recorded.run_step(step(recorded, seed=seed))
        counts.append(graphs.replays)
    assert counts == [0, 1, 2, 3]
    assert recorded.graph_bytes() == 2**20


@torch.no_grad()
def test_hooks_are_heard(device):
    """Attention maps are read by hooks, which a replay would not call."""
    recorded, _ = networks(device)
    for seed in range(3):
        recorded.run_step(step(recorded, seed=seed))
    with attention_maps.recorded(recorded, [0]) as recording:
        recorded.run_step(step(recorded))
    assert recording.passes == 1
    assert recording.attentions


def test_gradients_pass(device):
    """Noise may be optimised through the network, and through a step."""
    recorded, plain = networks(device)
    found = []
    for network, run in ((recorded, recorded.run_step), (plain, plain.run_step)):
        made = step(network)
        latents = made.inputs.latents.requires_grad_()
        run(made)[0].square().sum().backward()
        found.append(latents.grad)
    assert torch.equal(*found)
    assert not recorded.recent


@torch.no_grad()
def test_replaced_parameters_need_a_new_recording(device):
    """A graph reads where parameters were, so what changes them all forgets it."""
    recorded, plain = networks(device)
    before = [recorded.run_step(step(recorded)) for _ in range(3)][-1]
    last = recorded.out[2]
    last.weight = nn.Parameter(2 * last.weight, requires_grad=False)
    plain.out[2].weight = nn.Parameter(2 * plain.out[2].weight, requires_grad=False)
    assert equal(recorded.run_step(step(recorded)), before)
    assert recorded.forget_graphs()
    assert not recorded.forget_graphs()
    assert all(equal(recorded.run_step(step(recorded)), plain.run_step(step(plain))) for _ in range(3))
    recorded.to(torch.float64)
    assert not recorded.recent


@torch.no_grad()
def test_what_is_dropped_is_freed_at_once(graphs):
    """Its memory is wanted, so nothing of it may wait for Python's collector."""
    recorded, _ = networks(CPU)
    for frames in (2, 2, 3, 3):
        recorded.run_step(step(recorded, frames))
    kept = [weakref.ref(fixed.recording.graph) for fixed in recorded.recent.values()]
    gc.disable()
    try:
        recorded.recent.popitem(last=False)
        assert [reference() is None for reference in kept] == [True, False]
        recorded.forget_graphs()
        assert kept[1]() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_a_capture_that_failed_is_not_tried_again(graphs):
    wrong = [RuntimeError("operation not permitted when stream is capturing")]

    def call():
        if recording.runs == 2 and wrong:
            raise wrong.pop()
        return torch.ones(2)

    recording = Recording(call, CPU)
    recording()
    with pytest.raises(RuntimeError, match="not permitted"):
        recording()
    assert torch.equal(recording(), torch.ones(2))
    assert graphs.replays == 0
    assert recording.graph is None


def test_what_comes_while_it_grows_stays():
    kept = Recent()
    with growing():
        for key in range(SHAPES + 3):
            kept.take(key, lambda key=key: -key)
    assert kept.take(0, lambda: 1) == 0
    kept.take("more", lambda: 1)
    assert len(kept) == SHAPES + 3
    assert list(kept)[-2:] == [0, "more"]
    assert Recent().most == SHAPES


def test_what_was_not_used_for_longest_makes_room():
    kept = Recent()
    for key in range(SHAPES):
        kept.take(key, lambda key=key: -key)
    assert kept.take(0, lambda: 1) == 0
    assert kept.take(SHAPES, lambda: 9) == 9
    assert list(kept) == [*range(2, SHAPES), 0, SHAPES]
