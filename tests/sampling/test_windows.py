"""Windows cover a clip, are merged as their rule says, and give one pass's numbers where a window changes nothing."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from vstar_engine.config.models import MODELS
from vstar_engine.config.request import Request
from vstar_engine.config.sampling import Sampling, Tar
from vstar_engine.config.windows import AVERAGE, FREENOISE, NONE, PAPER, RANDOMIZED, SHARED, SHUFFLED, WindowPlan
from vstar_engine.kernels.temporal_attention import temporal_attention_probs, temporal_attention_ref, toeplitz_bias
from vstar_engine.networks.blocks import TemporalBlock, attention_windows
from vstar_engine.networks.denoiser import Denoiser
from vstar_engine.networks.guide_keys import GuideKeys, guided_by
from vstar_engine.prompting.interpolation import FrameTexts, spread
from vstar_engine.sampling.batch import Batch, BatchRow
from vstar_engine.sampling.initial_noise import initial_noise
from vstar_engine.sampling.tar import toeplitz
from vstar_engine.sampling.window_merge import WindowMerge, cut, cuts, earlier_probability, starts
from vstar_engine.sampling.windows import WindowedDenoiser

SPEC, SIZE = MODELS["mini"], (32, 32)
BLENDS = (RANDOMIZED, PAPER, AVERAGE, NONE)


@pytest.mark.parametrize(
    ("frames", "count", "cost"),
    [(240, 5, 1.33), (1200, 25, 1.33), (4096, 85, 1.33), (128, 3, 1.50), (65, 2, 1.97), (64, 1, 1.0)],
)
def test_the_number_of_windows_and_their_cost(frames, count, cost):
    plan = WindowPlan(frames, 64, 16)
    assert (plan.count, len(plan.starts), round(plan.cost, 2)) == (count, count, cost)


@pytest.mark.parametrize("frames", [65, 80, 113, 240, 1200, 9999])
@pytest.mark.parametrize(("window", "overlap"), [(64, 16), (64, 0), (16, 12), (38, 12)])
def test_windows_cover_the_clip_and_share_what_they_should(frames, window, overlap):
    plan = WindowPlan(frames, window, overlap)
    for shift in (-plan.most_shift, 0, plan.most_shift):
        begins = plan.shifted(shift)
        assert (begins[0], begins[-1]) == (0, frames - window)
        assert all(0 < b - a <= window for a, b in pairwise(begins))
    assert all(a + window - b >= overlap for a, b in pairwise(plan.starts))
    assert all(0 < border < frames for border in plan.borders)


def test_cuts_depend_on_seed_step_and_window_alone():
    drawn = {(s, i, w): cut(RANDOMIZED, 16, s, i, w) for s in (0, 7) for i in range(4) for w in range(1, 40)}
    assert {(s, i, w): cut(RANDOMIZED, 16, s, i, w) for s, i, w in reversed(drawn)} == drawn
    assert set(drawn.values()) == set(range(16))
    assert {cut(PAPER, 2, 0, 0, w) for w in range(60)} == {0, 1, 2}
    # a change here changes every long video of a seed
    assert [cut(RANDOMIZED, 16, 5, 2, window) for window in range(1, 5)] == [9, 6, 8, 1]


@pytest.mark.parametrize("blend", [RANDOMIZED, PAPER])
def test_the_drawn_cuts_have_the_rules_probability(blend):
    drawn = np.array([cut(blend, 8, 3, i, w) for i in range(50) for w in range(80)])
    found = [(drawn > frame).mean() for frame in range(8)]
    np.testing.assert_allclose(found, earlier_probability(blend, 8), atol=0.03)


def merged(blend, parts, begins, frames, dropped=None):
    merge = WindowMerge(frames, blend)
    for start, part, kept in zip(begins, parts, dropped or [0] * len(begins), strict=True):
        merge.add(start, part, kept)
    return merge.result()[0, 0, :, 0, 0].tolist()


def test_merge_rules():
    parts = [torch.full((1, 1, 4, 1, 1), float(value)) for value in (1, 2)]
    assert merged(NONE, parts, [0, 2], 6) == [1, 1, 2, 2, 2, 2]
    assert merged(RANDOMIZED, parts, [0, 2], 6, [0, 1]) == [1, 1, 1, 2, 2, 2]
    # weights 1 2 2 1 of each window
    assert merged(AVERAGE, parts, [0, 2], 6) == pytest.approx([1, 1, (2 + 2) / 3, (1 + 4) / 3, 2, 2])


def test_phase_moves_inner_windows_from_step_to_step():
    plan = WindowPlan(40, 8, 4, phase=True)
    found = {tuple(starts(plan, 1, step)) for step in range(12)}
    assert len(found) > 2
    assert {(begins[0], begins[-1]) for begins in found} == {(0, 32)}
    assert starts(WindowPlan(40, 8, 4), 1, 3) == WindowPlan(40, 8, 4).starts


@pytest.mark.parametrize("mode", ["linear", "ease", "hold"])
def test_text_rows_of_a_window_are_those_of_the_clip(mode):
    anchors, where = torch.randn(4, 3, 5), (0, 7, 8, 29)
    whole = spread(anchors, 30, mode, where)
    texts = FrameTexts(anchors, where, mode, torch.float32)
    for start, stop in [(0, 30), (0, 5), (7, 8), (6, 20), (28, 30), (29, 30)]:
        assert torch.equal(texts.rows(start, stop)[0], whole[start:stop])


def test_initial_noise():
    shape, generator = (1, 4, 40, 12, 12), torch.Generator
    shuffled = initial_noise(Request(("a",), 40, window=16, overlap=12, noise=SHUFFLED), shape, generator().manual_seed(1))
    first = {tuple(frame.flatten().tolist()) for frame in shuffled[0, :, :16].transpose(0, 1)}
    assert {tuple(frame.flatten().tolist()) for frame in shuffled[0].transpose(0, 1)} == first
    for start in range(16, 40, 4):  # a unit holds what the same unit a window before held, in another order
        unit, before = (
            x[0].transpose(0, 1).flatten(1)
            for x in (shuffled[:, :, start : start + 4], shuffled[:, :, start - 16 : start - 12])
        )
        assert sorted(unit.sum(1).tolist()) == sorted(before.sum(1).tolist())
    shared = initial_noise(Request(("a",), 40, noise=SHARED, noise_share=0.5), shape, generator().manual_seed(1))
    assert float(shared.var()) == pytest.approx(1, abs=0.1)
    rows = shared[0].transpose(0, 1).flatten(1)
    assert float(torch.corrcoef(rows)[0, 1:].mean()) == pytest.approx(0.5, abs=0.1)


class Toy(Denoiser):
    """Predicts each frame from itself, its text and, with `mixing`, the mean of its window."""

    def __init__(self, mixing=0.0):
        self.mixing, self.texts, self.calls = mixing, [], []

    def __call__(self, latents, timestep, context, fps, tar):
        assert tar.shape[-1] == latents.shape[2]
        self.texts.append(context.shape[1])
        self.calls.append(latents.shape[0])
        branches = len(context) // len(latents)
        heard = context.float().mean(dim=(2, 3))[:, None, :, None, None]
        mixed = latents + self.mixing * latents.mean(dim=2, keepdim=True)
        return 0.3 * mixed.repeat(branches, 1, 1, 1, 1) + heard


def sampled(toy, wrapped, *requests, at_once=1):
    """Samples requests of 20 frames through a toy network, in windows where `wrapped`."""
    rows = []
    for i, request in enumerate(requests):
        anchors = torch.randn(3, 77, 8, generator=torch.Generator().manual_seed(9))
        texts = FrameTexts(anchors, (0, 4, 19), "linear", torch.float32)
        context = texts if wrapped else texts.rows(0, 20)
        rows.append(BatchRow.of(i, request, None, context, torch.zeros(1, 1, 77, 8), SPEC))
    denoiser = WindowedDenoiser(toy, requests[0].plan, at_once) if wrapped else toy
    batch = Batch(denoiser, SPEC, torch.float32, rows)
    while batch.done < batch.steps:
        batch.step()
    return [row.latents for row in sorted(batch.rows, key=lambda row: row.index)]


def request(seed=0, blend=RANDOMIZED, guidance=3.0, window=8, **given):
    sampling = Sampling(4, guidance=guidance, batch_guidance=given.pop("batch_guidance", True))
    return Request(("a", "b", "c"), 20, seed, SIZE, sampling, Tar(), window=window, overlap=3, blend=blend, **given)


@pytest.mark.parametrize("blend", BLENDS)
def test_windows_of_a_network_that_looks_at_single_frames_give_one_pass(blend):
    toy = Toy()
    (windowed,) = sampled(toy, True, request(blend=blend, phase=True))
    assert set(toy.texts) == {8}  # text rows are made for a window, never for the clip
    (whole,) = sampled(Toy(), False, request(window=None))
    torch.testing.assert_close(windowed, whole, rtol=1e-5, atol=1e-5)


def test_results_do_not_depend_on_how_many_windows_share_a_call():
    asked = request(3), request(4, guidance=1.0), request(5, guidance=5.0)
    together = sampled(Toy(0.5), True, *asked)
    for wide in (1, 2, 9):
        alone = [sampled(Toy(0.5), True, one, at_once=wide)[0] for one in asked]
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert torch.equal(alone[0], sampled(Toy(0.5), True, asked[0], at_once=wide)[0])


def test_a_step_tells_of_its_windows(mini):
    told = []
    asked = Request(("snow",), 12, 0, SIZE, Sampling(2), None, window=6, overlap=2)
    mini.run(asked, on_window=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)] * 2


def test_two_passes_of_guidance_give_what_one_gives():
    (one,), (two,) = (sampled(Toy(0.5), True, request(1, batch_guidance=both)) for both in (True, False))
    torch.testing.assert_close(one, two)


def test_the_rule_and_the_seed_of_cuts_matter_where_windows_differ():
    made = [sampled(Toy(0.5), True, request(2, blend))[0] for blend in BLENDS]
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(made) for b in made[:i])


def test_cuts_of_a_step_lie_in_what_windows_share():
    plan = WindowPlan(41, 16, 4)
    begins = plan.starts
    for step in range(20):
        found = cuts(plan, begins, 0, step)
        assert found[0] == 0
        assert all(0 <= c < a + 16 - b for c, (a, b) in zip(found[1:], pairwise(begins), strict=True))
    assert cuts(WindowPlan(41, 16, 4, NONE), begins, 0, 0) == [0] * len(begins)


def test_freenoise_is_diffusers_block():
    """Windows over both attentions of a temporal block, averaged by triangular weights, with and without a short last one."""
    oracle = pytest.importorskip("diffusers.models.attention")
    torch.manual_seed(0)
    block = TemporalBlock(32, 2, 16)
    theirs = oracle.FreeNoiseTransformerBlock(
        32, 2, 16, activation_fn="geglu", double_self_attention=True, context_length=8, context_stride=4
    ).eval()
    ours = block.state_dict()
    for name in ("attn1", "attn2"):
        for part, weight in zip("qkv", ours.pop(f"{name}.to_qkv.weight").chunk(3), strict=True):
            ours[f"{name}.to_{part}.weight"] = weight
    theirs.load_state_dict(ours)
    x = torch.randn(1, 20, 6, 32)
    plan = WindowPlan(20, 8, 4, FREENOISE)
    with torch.no_grad(), attention_windows(block, plan.starts, plan.window):
        found = block(x, torch.zeros(1, 20))
        expected = theirs(x[0].transpose(0, 1)).transpose(0, 1)[None]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(block(x, torch.zeros(1, 20)), expected, atol=1e-3)


def test_a_freenoise_video_is_one_pass_in_attention_windows(mini):
    asked = Request(("snow",), 12, 0, SIZE, Sampling(2), Tar({0: 1.0}), window=6, overlap=3, blend=FREENOISE, noise=SHUFFLED)
    assert asked.pass_frames == 12
    made = mini.run(asked).frames
    assert made.shape == (12, *SIZE, 3)
    assert not np.array_equal(made, mini.run(replace(asked, window=None, noise="independent")).frames)
    with pytest.raises(ValueError, match="one pass takes at most 512 frames"):
        replace(asked, frames=600)


@pytest.mark.parametrize("guide", ["first:3", "every:7"])
def test_guide_keys_are_heard_by_the_other_windows(mini, guide):
    asked = Request(("snow",), 20, 0, SIZE, Sampling(2), Tar(), window=8, overlap=2)
    plain, guided = mini.run(asked).frames, mini.run(replace(asked, guide=guide)).frames
    assert not np.array_equal(plain[10:], guided[10:])
    assert all(block.more_keys is None for block in mini.denoiser.modules() if isinstance(block, TemporalBlock))


def test_a_negative_strength_takes_weight_from_near_frames(mini):
    """The signed band gain of TiARA (arXiv 2412.17254) is TAR's own dial."""
    asked = Request(("snow",), 12, 0, SIZE, Sampling(2), Tar({0: 1.0}, strength=-6.0, until_step=1), window=8, overlap=2)
    videos = [mini.run(replace(asked, tar=tar)).frames for tar in (asked.tar, None, Tar({0: 1.0}, until_step=1))]
    assert all(not np.array_equal(a, b) for i, a in enumerate(videos) for b in videos[:i])
    q, k = torch.rand(2, 1, 12, 4, 2, 16).unbind(0)
    near = [temporal_attention_probs(q, k, toeplitz(12, 1.0, strength), [0])[0, 0].diagonal().mean() for strength in (-6, 0, 1)]
    assert near[0] < near[1] < near[2]


def test_guide_keys_are_keys_without_a_bias():
    torch.manual_seed(0)
    block, x, other = TemporalBlock(32, 2, 16), torch.randn(2, 6, 3, 32), torch.randn(2, 5, 3, 32)
    g = torch.rand(1, 6)
    keys = GuideKeys([1, 3])
    with torch.no_grad(), guided_by(block, keys):
        assert torch.equal(block(other, g[:, :5]), TemporalBlock.forward(block, other, g[:, :5]))
        keys.recording = False
        found = block(x, g), block(x, toeplitz_bias(g, 6, 6))
    torch.testing.assert_close(*found)
    # one attention, with the keys of both by hand
    norm = block.norm1.given()
    q, k, v = block.attn1.to_qkv(x, norm=norm).unflatten(-1, (3, 2, 16)).unbind(-3)
    _, k2, v2 = block.attn1.to_qkv(other, norm=norm).unflatten(-1, (3, 2, 16)).unbind(-3)
    joined = [torch.cat([a, b[:, [1, 3]]], dim=1) for a, b in ((k, k2), (v, v2))]
    expected = temporal_attention_ref(q, *joined, g)
    torch.testing.assert_close(temporal_attention_ref(q, *keys(block.attn1, k, v), g), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"guide": "second:3"}, "guide keys are first:N"),
        ({"guide": "first:9"}, "guide 'first:9' is 9 frames, at most a window's 8"),
        ({"guide": "every:2"}, "guide 'every:2' is 10 frames"),
        ({"guide": "first:2", "window": None}, "guide keys are for clips in windows"),
        ({"window": 0}, "a window must have 1 to 512 frames, got 0"),
        ({"window": 513}, "a window must have 1 to 512 frames, got 513"),
        ({"overlap": 8}, "the overlap must be 0 to 7 frames, below the window, got 8"),
        ({"overlap": -1}, "the overlap must be 0 to 7 frames"),
        ({"blend": "soft"}, "blend must be one of randomized, .*, got 'soft'"),
        ({"noise": "loud"}, "noise must be one of independent, .*, got 'loud'"),
        ({"noise": "freenoise", "window": None}, "so it needs --window"),
        ({"noise_share": 1.5}, "the shared part of the noise is 0 to 1, got 1.5"),
        ({"frames": 600, "window": None}, "one pass takes at most 512 frames, got 600; .*--window 64 --overlap 16 .1.39 times"),
        ({"frames": 10001}, "frames must be 1 to 10000, got 10001"),
        ({"sampling": Sampling(fast=("step-cache",))}, "step-cache keeps features of one pass"),
    ],
)
def test_windows_that_cannot_be(given, said):
    with pytest.raises(ValueError, match=said):
        Request(**{"states": ("a",), "frames": 20, "window": 8, "overlap": 3, **given})
