"""Steps that run the finest level alone: exact where the features are those of the same step, each branch with its own."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.engines import engine_like
from vstar_engine import Sampling, Tar
from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.bench.harness.random_networks import seeded_unet
from vstar_engine.config.models import MODELS
from vstar_engine.config.request import Request
from vstar_engine.machine import memory
from vstar_engine.networks.blocks import Stage
from vstar_engine.networks.precomputed import CachedFeatures
from vstar_engine.networks.unet import UNet
from vstar_engine.sampling.step_cache import StepCache

CACHED = ("step-cache",)
SIZE = (32, 64)
# relative difference of the last of 20 steps; one twice as far is no longer the same video
NEAR = 0.2


def request(*states, seed=0, steps=4, fast=CACHED, **sampling):
    return Request(states, 3, seed, SIZE, Sampling(steps, fast=fast, **sampling), Tar({0: 1.0}, until_step=1))


def latents(engine, requests, drop=None):
    """Runs a batch, from which the video of index `drop` is taken after the first step; returns each video's latents."""
    batch = engine.begin(requests)
    while batch.done < batch.steps:
        batch.step()
        if batch.done == 1 and drop is not None:
            batch.drop(drop)
    return {row.index: row.latents for row in batch.rows}


def step_inputs(spec, rows, frames=3, texts=1):
    g = torch.Generator().manual_seed(1)
    context = torch.randn(rows * texts, 1, 77, spec.context_dim, generator=g)
    tar = torch.rand(1, spec.levels, frames, generator=g)
    return torch.randn(rows, 4, frames, 4, 8, generator=g), torch.full((rows, 1), 481), context, torch.full((rows,), 28), tar


def forward(unet, cache, branches, whole, inputs):
    """Runs the network as a step does: whole, keeping its features, or on those that are kept."""
    cached = cache.features(branches, whole)
    unet(*inputs, cached)
    if whole:
        cache.keep(branches, cached.features)


@pytest.fixture
def ran(mini):
    """Names the blocks that run, as they run."""
    names, hooks = [], []
    for name, module in mini.denoiser.named_modules():
        if isinstance(module, Stage):
            hooks.append(module.register_forward_hook(lambda *_, name=name: names.append(name)))
    yield names
    for hook in hooks:
        hook.remove()


@torch.inference_mode()
@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("dense", [False, True], ids=["rows", "dense"])
@pytest.mark.parametrize("texts", [1, 2])
def test_features_of_the_same_step_give_the_same_noise_to_the_bit(mini, stages, dense, texts):
    *inputs, tar = step_inputs(mini.spec.unet, rows=2, texts=texts)
    tar = tar[..., None] * tar[..., None, :] if dense else tar
    cached = CachedFeatures(stages)
    whole = mini.denoiser(*inputs, tar, cached)
    assert torch.equal(whole, mini.denoiser(*inputs, tar))
    assert torch.equal(whole, mini.denoiser(*inputs, tar, cached))


@torch.inference_mode()
@pytest.mark.parametrize("stages", [2, 4])
def test_levels_without_texts_take_features_that_know_them(stages):
    """Where the finest level has no cross-attention, branches part below it: only its cached features differ."""
    spec = replace(MODELS["mini"].unet, attention_levels=(2,))
    unet = seeded_unet(spec, "cpu", torch.float32)
    inputs, cached = step_inputs(spec, rows=1, texts=2), CachedFeatures(stages)
    whole = unet(*inputs, cached)
    assert len(whole) == 2
    assert not torch.equal(whole[0], whole[1])
    assert torch.equal(whole, unet(*inputs, cached))


@torch.inference_mode()
def test_what_the_features_hold_is_not_computed_again(mini, ran):
    inputs, cache = step_inputs(mini.spec.unet, rows=1), StepCache(mini.spec.unet)
    forward(mini.denoiser, cache, ["a"], True, inputs)
    whole = ran.copy()
    ran.clear()
    forward(mini.denoiser, cache, ["a"], False, inputs)
    assert ran == ["input_blocks.0", "input_blocks.1", "output_blocks.4", "output_blocks.5"]
    assert set(ran) < set(whole)


def test_every_second_step_is_whole(mini, ran):
    latents(mini, [request("snow", steps=5)])
    assert ran.count("middle_block") == 3
    assert ran.count("output_blocks.5") == 5


def test_the_first_step_is_exact_and_the_rest_near_it(mini):
    exact, cached = (request("snow", "flowers", steps=20, fast=fast) for fast in ((), CACHED))
    batches = [mini.begin([one]) for one in (exact, cached)]
    apart = []
    for _ in range(20):
        for batch in batches:
            batch.step()
        a, b = (batch.rows[0].latents for batch in batches)
        apart.append(float((a - b).norm() / a.norm()))
    assert apart[0] == 0
    assert 0 < apart[-1] < NEAR


@pytest.mark.parametrize("fast", [CACHED, ("step-cache", "guidance-interval")], ids=", ".join)
def test_every_branch_has_its_own_features(mini, fast):
    requests = [request(state, seed=i, fast=fast) for i, state in enumerate(["snow", "a red ball", "night"])]
    alone = [latents(mini, [one])[0] for one in requests]
    passes = [request("snow", seed=0, fast=fast, batch_guidance=False), *requests[1:]]
    for together in (latents(mini, requests), latents(mini, requests, drop=1), latents(mini, passes)):
        for index, found in together.items():
            assert torch.allclose(found, alone[index], atol=1e-4)


def test_videos_of_one_batch_agree_on_it(mini):
    with pytest.raises(ValueError, match=r"share frames, size and steps, .*'step-cache'"):
        mini.begin([request("snow"), request("snow", fast=())])


def test_a_built_engine_refuses_in_a_sentence(mini):
    built = engine_like(mini, artifact=BuiltEngine(Path("DIR"), {"identity": {"size": None}}))
    with pytest.raises(ValueError, match="step-cache needs the network in eager PyTorch, and DIR can only run it whole"):
        built.begin([request("snow")])


@pytest.mark.parametrize("name", ["mini", "videocrafter2"])
def test_the_plan_of_memory_holds_for_it(name):
    spec = MODELS[name]
    cells = [side // spec.vae.factor for side in spec.size]
    with memory.without_data():
        unet = memory.in_dtype(UNet(spec.unet), torch.float16)
        inputs = [
            torch.empty(1, 4, 16, *cells, dtype=torch.float16),
            torch.empty(1, 1, dtype=torch.int64),
            torch.empty(2, 16, 77, spec.unet.context_dim, dtype=torch.float16),
            torch.empty(1, dtype=torch.int64),
            torch.empty(1, spec.unet.levels, 16, dtype=torch.float32),
        ]
        with memory.LiveBytes() as plain:
            unet(*inputs)
        cache = StepCache(spec.unet)
        with memory.LiveBytes() as cached:
            for step in range(3):
                forward(unet, cache, ["cond", "uncond"], step % 2 == 0, inputs)
    assert cached.peak <= memory.MARGIN * plain.peak
