"""A queue makes what sampling makes of single frames, and each frame has its own level, text and TAR."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vstar_engine.config.models import MODELS
from vstar_engine.config.request import Request
from vstar_engine.config.sampling import Sampling, Tar
from vstar_engine.networks.denoiser import Denoiser
from vstar_engine.prompting.interpolation import FrameTexts
from vstar_engine.sampling.batch import Batch, BatchRow
from vstar_engine.sampling.fifo import FifoBatch
from vstar_engine.sampling.schedule import alpha_bar, scale_arr

SPEC = MODELS["mini"]
ASKED = Request(
    ("a", "b"),
    11,
    0,
    (32, 32),
    Sampling(8, eta=0.0, guidance=2.0),
    Tar({0: 1.0}, until_step=2),
    window=4,
    blend="fifo",
    overlap=0,
)


class Toy(Denoiser):
    """Predicts noise that leads every frame to the mean of its text, and remembers what it was given."""

    module = torch.nn.Identity()

    def __init__(self):
        self.given = []

    def __call__(self, latents, timestep, context, fps, tar):
        self.given.append((timestep, context, tar))
        heard = context.mean(dim=(2, 3))[:, None, :, None, None].expand(-1, *latents.shape[1:])
        if timestep.shape[1] == 1:
            timestep = timestep.expand(-1, latents.shape[2])
        alpha, scale = (torch.from_numpy(x)[timestep].float()[:, None, :, None, None] for x in (alpha_bar(), scale_arr()))
        rows = latents.repeat(len(context), 1, 1, 1, 1)
        return (rows - alpha.sqrt() * scale * heard) / (1 - alpha).sqrt()


@pytest.fixture
def made():
    anchors = torch.stack([torch.full((77, 8), value) for value in (1.0, 2.0)])
    texts = FrameTexts(anchors, (0, 10), "linear", torch.float32)
    # both branches hear the same, so that guidance changes nothing
    row = BatchRow.of(0, ASKED, None, texts, texts, SPEC)
    toy = Toy()
    batch = FifoBatch.of(Batch(toy, SPEC, torch.float32, [row]))
    while batch.done < batch.steps:
        batch.step()
    return batch, toy


def test_each_frame_becomes_what_its_text_says(made):
    batch, _ = made
    assert batch.steps == 8 + 4 + 11
    found = batch.rows[0].latents.mean(dim=(0, 1, 3, 4))
    torch.testing.assert_close(found, torch.linspace(1, 2, 11), atol=0.05, rtol=0)


def test_the_queue_gives_each_frame_its_own_level_and_tar(made):
    batch, toy = made
    timestep, context, bias = toy.given[-1]  # the noisier of two partitions
    assert timestep.tolist() == [batch.schedule.timesteps[4:].tolist()]
    assert context.shape == (2, 4, 77, 8)
    # of 8 steps the first 3 are regularised: those of the last places
    active = bias[0, 0].abs().sum(1) > 0
    assert active.tolist() == [False, True, True, True]
    assert bias[0, 0, 1].tolist() == pytest.approx(np.exp(-np.array([1, 0, 1, 4]) / 2).tolist())
    assert toy.given[-2][2].abs().sum() == 0
    assert max(len(given[1][0]) for given in toy.given) == 4


def test_a_video_by_a_queue(mini):
    asked = replace(ASKED, sampling=Sampling(8, guidance=6.0), states=("snow", "house"))
    steps = []
    video = mini.run(asked, lambda done, total: steps.append((done, total)))
    assert video.frames.shape == (11, 32, 32, 3)
    assert steps[-1] == (23, 23)
    np.testing.assert_array_equal(mini.run(asked).frames, video.frames)


def test_what_a_queue_does_not_take(mini):
    with pytest.raises(ValueError, match="give a multiple of 4 steps, got 10"):
        replace(ASKED, sampling=Sampling(10))
    with pytest.raises(ValueError, match="makes one video at a time, got 2"):
        mini.begin([ASKED, ASKED])
