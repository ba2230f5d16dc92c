"""Enhancing: every frame is covered, one window is plain SDEdit, cuts are drawn anew in every step."""

import random

import numpy as np
import pytest
import torch

from vstar_engine import Engine, Sampling
from vstar_engine.commands.main import main
from vstar_engine.config.streamed import StreamedRequest
from vstar_engine.enhancing import Enhancement, enhance, upscaled
from vstar_engine.networks.blended import BlendedDenoiser, cut_frames, window_starts
from vstar_engine.networks.denoiser import Denoiser
from vstar_engine.video import Video, read_provenance
from vstar_engine.video_input import whole_video


@pytest.mark.parametrize("frames", [1, 16, 24, 25, 39, 40, 41, 240])
def test_windows_cover_every_frame(frames):
    starts = window_starts(frames, 24, 8)
    seen = {frame for start in starts for frame in range(start, min(start + 24, frames))}
    assert seen == set(range(frames))
    assert starts == sorted(set(starts))
    assert max(starts) == max(0, frames - 24)


def test_cuts_are_uniform_within_the_overlap():
    cuts = [cut_frames([0, 16, 32], 24, draw)[1:] for draw in [random.Random(4)] for _ in range(4000)]
    for column, start in zip(np.array(cuts).T, (16, 32), strict=True):
        assert set(column) == set(range(start, start + 8))
        assert np.bincount(column - start).std() < 60


class Numbers(Denoiser):
    """Predicts the number of the call."""

    calls = 0

    def __call__(self, latents, timestep, context, fps, tar):
        self.calls += 1
        return torch.full((len(context), *latents.shape[1:]), float(self.calls))


def test_each_frame_has_one_window_and_the_cut_moves():
    blended, cuts = BlendedDenoiser(Numbers(), 8, 4, random.Random(0)), set()
    for call in range(12):
        out = blended(
            torch.zeros(1, 1, 14, 1, 1), torch.zeros(1, 1), torch.zeros(2, 1, 77, 4), torch.ones(1), torch.zeros(1, 1, 14)
        )
        shown = out[1].flatten() - 3 * call
        assert shown.tolist() == sorted(shown.tolist())
        assert set(shown.tolist()) <= {1.0, 2.0, 3.0}
        cuts.add(int((shown == 1).sum()))
    assert cuts <= set(range(4, 8))
    assert len(cuts) > 2


def test_upscaling_fills_the_size():
    """Without bars, the sides beyond it are cut off evenly."""
    frames = np.zeros((1, 20, 40, 3), np.uint8)
    frames[:, :, 10:30] = 255
    made = upscaled(frames, (40, 40))
    assert made.shape == (1, 3, 40, 40)
    assert (made > 0.99).float().mean() > 0.9


def test_a_longer_video_is_enhanced(tmp_path, capsys):
    rng = np.random.default_rng(0)
    frames = np.repeat(rng.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8), 14, axis=0)
    Video(frames, 8.0, {}).save(tmp_path / "in.mp4")
    words = ["enhance", str(tmp_path / "in.mp4"), "--prompt", "a lake", "--model", "mini", "--size", "64x64", "--steps", "2"]
    more = ["--window", "8", "--overlap", "4", "--strength", "0.5", "--guidance", "2", "--out", str(tmp_path / "out.mp4")]
    assert main([*words, *more]) == 0
    assert "14 frames of 64x64" in capsys.readouterr().out
    made, fps = whole_video(tmp_path / "out.mp4")
    assert (made.shape, fps) == ((14, 64, 64, 3), 8.0)
    about = read_provenance(tmp_path / "out.mp4")
    assert about["enhanced"] == {"window": 8, "overlap": 4, "strength": 0.5}
    assert about["source"]["video"] == "in.mp4"


def test_one_window_is_the_network_itself():
    """A video no longer than a window, in windows and at once."""
    engine = Engine.load("mini")
    frames = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    request = StreamedRequest(("a lake",), 4, size=(32, 32), sampling=Sampling(steps=2, guidance=2.0), tar=None)
    whole = enhance(engine, frames, request, Enhancement(strength=0.5)).frames
    assert np.array_equal(whole, enhance(engine, frames, request, Enhancement(4, 2, 0.5)).frames)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--overlap", "24"], "an overlap smaller than it"),
        (["--strength", "0"], "strength is above 0"),
        (["--size", "33x32"], "multiples of 32"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refusals(more, said, tmp_path, capsys):
    Video(np.zeros((2, 32, 32, 3), np.uint8), 8.0, {}).save(tmp_path / "in.mp4")
    given = ["enhance", str(tmp_path / "in.mp4"), "--prompt", "a", "--model", "mini", "--out", str(tmp_path / "out.mp4"), *more]
    assert main(given) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.mp4").exists()
