"""Similarity, cuts and recorded attention against what they are by definition."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vstar_engine.analysis import attention_maps, similarity
from vstar_engine.config.models import MODELS
from vstar_engine.kernels.temporal_attention import temporal_attention_probs
from vstar_engine.networks.precomputed import CachedFeatures
from vstar_engine.networks.unet import UNet
from vstar_engine.sampling.tar import toeplitz


def flat(levels, height=32, width=48):
    """A video whose frame t is all `levels[t]`."""
    return np.broadcast_to(np.uint8(levels)[:, None, None, None], (len(levels), height, width, 3)).copy()


def test_cosine_tells_bright_from_dark():
    matrix = similarity.cosine(similarity.pixels(flat([0, 255, 255, 0])))
    np.testing.assert_allclose(matrix, [[1, -1, -1, 1], [-1, 1, 1, -1], [-1, 1, 1, -1], [1, -1, -1, 1]], atol=1e-6)


def test_pixels_are_means_of_eight_by_eight_cells():
    frames = np.random.default_rng(0).integers(0, 256, (3, 37, 50, 3), dtype=np.uint8)
    features = similarity.pixels(frames)
    assert features.shape == (3, 4 * 6 * 3)
    np.testing.assert_allclose(features[1, :3], frames[1, :8, :8].mean((0, 1)) / 127.5 - 1, rtol=1e-5)


def test_overlap_is_what_two_frames_share():
    shares = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(similarity.overlap(shares), [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize("frames", [2, 5, 64])
def test_similarity_by_interval_neighbours_and_dynamics(frames):
    at = np.arange(frames)
    matrix = 1.0 - 0.01 * np.abs(at[:, None] - at[None])
    np.testing.assert_allclose(similarity.by_interval(matrix), 1.0 - 0.01 * at)
    assert similarity.neighbours(matrix) == pytest.approx(0.99)
    assert similarity.dynamics(matrix) == pytest.approx(0.01 * at[frames // 2 :].mean())


@pytest.mark.parametrize(
    ("levels", "cuts"),
    [([100] * 8, []), ([20] * 4 + [220] * 4, [4]), (range(0, 240, 30), []), ([20, 21, 220, 221, 20, 21, 22, 23], [2, 4])],
    ids=["still", "one cut", "steady change", "there and back"],
)
def test_scene_cuts(levels, cuts):
    assert similarity.scene_cuts(flat(list(levels))) == cuts


def test_dreamsim_says_what_to_install(modules):
    modules({"dreamsim": None})
    with pytest.raises(ImportError, match="pip install dreamsim"):
        similarity.dreamsim(flat([0, 1]))


def test_dreamsim_embeds_each_frame_with_its_own_preprocessing(modules):
    model = SimpleNamespace(embed=lambda picture: picture.mean((2, 3)))
    loaded = (model, lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float())
    modules({"dreamsim": SimpleNamespace(dreamsim=lambda pretrained, device: loaded)})
    similarity._dreamsim.cache_clear()
    try:
        np.testing.assert_allclose(similarity.dreamsim(flat([0, 100, 255])), np.repeat([[0.0], [100.0], [255.0]], 3, 1))
    finally:
        similarity._dreamsim.cache_clear()


@pytest.fixture(scope="module")
def recording():
    spec = MODELS["mini"].unet
    torch.manual_seed(0)
    unet, frames = UNet(spec).eval(), 6
    rows = torch.zeros(1, spec.levels, frames)
    rows[0, 0] = toeplitz(frames, 1.0)
    given = (torch.randn(2, 4, frames, 8, 8), torch.tensor([[500], [500]]), torch.randn(2, 1, 77, 64), torch.tensor([28, 28]))
    with torch.inference_mode():
        plain = unet(*given, rows)
        with attention_maps.recorded(unet, [0, 70]) as recording:
            seen = unet(*given, rows)
            unet(*given, tar=rows * 0)
        unet(*given, rows)
    assert torch.equal(plain, seen)
    return recording


def test_recorded_attention_sums_to_one_in_both_passes(recording):
    assert recording.passes == 2
    per_pass = 2 * 10  # two attentions in each of ten temporal transformers; the stem's is not among them
    assert [one.step for one in recording.attentions] == [0] * per_pass + [1] * per_pass
    assert {one.level for one in recording.attentions} == {0, 1, 2}
    for one in recording.attentions:
        assert one.probs.shape == (2, 2, 6, 6)
        torch.testing.assert_close(one.probs.sum(-1), torch.ones(2, 2, 6))
        assert 0.0 <= one.positive <= 1.0
        assert one.spread > 0.0


def test_recorded_attention_is_regularised_at_its_level_only(recording):
    first, second = recording.attentions[:20], recording.attentions[20:]
    assert first[0].level == second[0].level == 0
    assert not torch.allclose(first[0].probs, second[0].probs)


@torch.inference_mode()
def test_attention_is_recorded_in_steps_that_keep_features_too():
    spec, frames = MODELS["mini"].unet, 3
    unet, tar = UNet(spec).eval(), torch.zeros(1, spec.levels, frames)
    given = (torch.randn(1, 4, frames, 8, 8), torch.tensor([[500]]), torch.randn(1, 1, 77, 64), torch.tensor([28]), tar)
    with attention_maps.recorded(unet, [0]) as recording:
        unet(*given, CachedFeatures(2))
    assert recording.tar is tar
    assert len(recording.attentions) == 20


def test_recorded_attention_is_the_kernels_own():
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 5, 3, 2, 16, generator=generator) for _ in range(2))
    probs = temporal_attention_probs(q, k, toeplitz(5, 1.0), [1])
    logits = torch.einsum("thd,shd->hts", q[0, :, 1], k[0, :, 1]) / 4
    at = torch.arange(5)
    bias = toeplitz(5, 1.0)[(at[:, None] - at[None]).abs()]
    exact = (logits + logits.amax(-1, keepdim=True) * bias).softmax(-1).mean(0)
    torch.testing.assert_close(probs[0, 0], exact)


def test_entropy_counts_the_frames_attended_to():
    assert attention_maps.entropy(torch.full((2, 4, 4), 0.25)) == pytest.approx(4.0)
    assert attention_maps.entropy(torch.eye(4)[None]) == pytest.approx(1.0)
