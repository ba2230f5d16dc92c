"""The whole path on the mini model: seeds, guidance, TAR, lengths and refusals."""

import numpy as np
import pytest
import torch

from support.denoisers import Watched
from support.engines import engine_like
from vstar_engine import Engine, Sampling, Tar
from vstar_engine.config.request import Request
from vstar_engine.errors import CheckpointError, DeviceError, MemoryShortage

SMALL = {"frames": 5, "size": (32, 64)}
QUICK = Sampling(steps=3)
STATES = ["snow", "flowers"]


@pytest.fixture(scope="module")
def video(mini):
    return mini.generate(STATES, seed=4, sampling=QUICK, **SMALL)


def differing(a, b):
    """The share of bytes that differ by more than rounding."""
    return float((np.abs(a.frames.astype(int) - b.frames.astype(int)) > 1).mean())


def test_a_video_is_bytes_with_its_settings_and_times(video):
    assert video.frames.shape == (5, 32, 64, 3)
    assert video.frames.dtype == np.uint8
    assert video.frames.std() > 10
    assert list(video.seconds) == ["text", "denoise", "decode"]
    assert video.provenance["request"]["states"] == tuple(STATES)


def test_a_seed_makes_the_same_video_again_and_another_does_not(mini, video):
    again = mini.generate(STATES, seed=4, sampling=QUICK, **SMALL)
    other = mini.generate(STATES, seed=5, sampling=QUICK, **SMALL)
    assert np.array_equal(video.frames, again.frames)
    assert differing(video, other) > 0.5


def test_guidance_in_one_batch_or_two_passes_is_the_same(mini, video):
    apart = mini.generate(STATES, seed=4, sampling=Sampling(steps=3, batch_guidance=False), **SMALL)
    assert differing(video, apart) < 0.005


@pytest.mark.parametrize(
    "change",
    [
        {"tar": None},
        {"tar": Tar({0: 4.0})},
        {"tar": Tar(until_step=0)},
        {"negative": "rain"},
        {"mode": "hold"},
        {"states": ["flowers", "snow"]},
        {"sampling": Sampling(steps=3, eta=0.0)},
        {"sampling": Sampling(steps=3, guidance=3.0)},
        {"sampling": Sampling(steps=3, fps_condition=8)},
    ],
    ids=str,
)
def test_every_setting_changes_the_video(mini, video, change):
    settings = {"states": STATES, "seed": 4, "sampling": QUICK, **SMALL, **change}
    assert differing(video, mini.generate(**settings)) > 0.01


def test_guidance_one_is_the_conditional_branch_alone(mini):
    calls = []
    counted = engine_like(mini, denoiser=Watched(mini.denoiser, lambda *given: calls.append(len(given[2]))))
    counted.generate("snow", sampling=Sampling(steps=2, guidance=1.0), **SMALL)
    assert calls == [1, 1]


def test_progress_is_heard_after_every_step(mini):
    steps = []
    mini.generate("snow", sampling=QUICK, on_step=lambda done, total: steps.append((done, total)), **SMALL)
    assert steps == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("frames", [1, 2, 17, 130])
def test_any_length(mini, frames):
    assert len(mini.generate("snow", frames=frames, size=(32, 32), sampling=Sampling(steps=1)).frames) == frames


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_near(mini, mini_weights, video, dtype):
    half = Engine.load("mini", mini_weights, dtype=dtype).generate(STATES, seed=4, sampling=QUICK, **SMALL)
    error = np.abs(video.frames.astype(int) - half.frames.astype(int)).mean()
    # random weights carry no smoothing prior: bfloat16's 8 bits of mantissa over three steps move a byte by a few units
    assert error < {"float16": 1.0, "bfloat16": 8.0}[dtype]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"states": []}, "no states"),
        ({"states": ["a"] * 6}, "6 states need"),
        ({"frames": 0}, "frames must be 1 to 10000, got 0"),
        ({"frames": 513}, "got 513"),
        ({"size": (33, 64)}, "multiples of 32"),
        ({"size": (0, 64)}, "multiples of 32"),
        ({"tar": Tar({3: 1.0})}, "level 3 does not exist"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"fps": 0.0}, "fps"),
        ({"mode": "cubic"}, "mode"),
    ],
    ids=str,
)
def test_requests_that_make_no_sense(mini, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        mini.generate(**{"states": "snow", **SMALL, **settings})


@pytest.mark.parametrize(
    ("settings", "error", "complaint"),
    [
        ({"model": "maxi"}, ValueError, "unknown model"),
        ({"backend": "magic"}, ValueError, "unknown backend"),
        ({"dtype": "int8"}, ValueError, "dtype must be"),
        ({"device": "warp"}, DeviceError, "unknown device"),
        ({"device": "meta"}, DeviceError, "not supported"),
        ({"model": "videocrafter2"}, CheckpointError, "comes without weights"),
        ({"spatial_attention": "flash"}, ValueError, "sdpa, xformers"),
    ],
    ids=str,
)
def test_engines_that_cannot_be(mini_weights, settings, error, complaint):
    with pytest.raises(error, match=complaint):
        Engine.load(**{"model": "mini", **settings})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there():
    with pytest.raises(DeviceError, match="no device cuda"):
        Engine.load("mini", device="cuda")


def test_frames_are_heard_as_they_are_decoded(mini, monkeypatch):
    parts = []
    request = Request(("snow", "flowers"), 11, 1, (32, 32), QUICK)
    video = mini.run(request, on_frames=parts.append)
    assert [len(part.frames) for part in parts] == [8, 3]
    assert (np.concatenate([part.frames for part in parts]) == video.frames).all()
    assert all(part.provenance == video.provenance for part in parts)


def test_what_does_not_fit_is_said_before_it_starts(mini, free_memory):
    free_memory(600 * 2**20)
    with pytest.raises(MemoryShortage, match="GiB are free"):
        mini.generate("snow", frames=512)
