"""Videos made together: each as if it were alone, cancelled between steps, within what a built engine takes."""

import numpy as np
import pytest
import torch

from support.denoisers import Watched
from support.engines import engine_at, engine_like
from vstar_engine import Sampling, Tar
from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.config.request import Request
from vstar_engine.errors import EngineError, MemoryShortage
from vstar_engine.machine import memory
from vstar_engine.prompting.synopsis import Synopsis

SIZE = (32, 64)
# float32: a wider batch sums a convolution or a product in another order; what is left of that after the steps, in latents of
# about unit scale. Eight times the largest difference seen (1.2e-5) over the requests below
LATENTS = 1e-4


def request(*states, seed=0, frames=5, steps=4, tar=None, negative="", negatives=(), **sampling):
    return Request(states, frames, seed, SIZE, Sampling(steps, **sampling), tar, negative, negatives=negatives)


MIXED = [
    request("snow", "flowers", seed=1, tar=Tar({0: 1.0, 1: 8.0}, until_step=1)),
    request("a red ball", seed=2, guidance=1.0),
    request("rain", "sun", "night", seed=3, tar=Tar({0: 4.0}, strength=0.5), guidance=3.0, eta=0.0),
    request("grass", "grass in snow", seed=1, negatives=("night", "day"), fps_condition=8),
]


def latents(engine, requests, **settings):
    """Runs a batch's steps and returns each video's latents by its index."""
    batch = engine.begin(requests, **settings)
    for _ in range(batch.steps):
        batch.step()
    return {row.index: row.latents for row in batch.rows}


@pytest.fixture(scope="module")
def alone(mini):
    return [latents(mini, [request])[0] for request in MIXED]


def apart(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1], [2, 0, 2]], ids=str)
def test_a_video_does_not_depend_on_those_it_rides_with(mini, alone, order):
    together = latents(mini, [MIXED[i] for i in order])
    assert all(apart(together[place], alone[i]) < LATENTS for place, i in enumerate(order))
    assert all(apart(alone[i], alone[j]) > 0.1 for i in range(4) for j in range(i))


def test_one_that_wants_two_passes_makes_all_take_them(mini, alone):
    sizes = []
    counting = engine_like(mini, denoiser=Watched(mini.denoiser, lambda *given: sizes.append(len(given[2]))))
    careful = request("rain", seed=9, batch_guidance=False)
    together = latents(counting, [MIXED[0], careful, MIXED[1]])
    assert sizes == [3, 2] * 4
    assert apart(together[0], alone[0]) < LATENTS
    assert apart(together[2], alone[1]) < LATENTS


def test_texts_are_projected_once(mini, alone, monkeypatch):
    calls, prepare = [], mini.denoiser.prepare_context
    monkeypatch.setattr(mini.denoiser, "prepare_context", lambda *given: calls.append(len(given)) or prepare(*given))
    assert apart(latents(mini, [MIXED[0]])[0], alone[0]) < LATENTS
    assert calls == [2]
    mini.run_batch(MIXED[:3], cancelled=lambda index: index == 1 and len(calls) > 1)
    assert calls == [2, 5, 4]


def test_run_is_the_case_of_one_to_the_bit(mini):
    (together,) = mini.run_batch([MIXED[0]])
    assert np.array_equal(together.frames, mini.run(MIXED[0]).frames)
    assert together.provenance["request"]["seed"] == 1
    assert list(together.seconds) == ["text", "denoise", "decode"]


def test_each_video_has_its_own_settings_on_it(mini):
    videos = mini.run_batch(MIXED[:2])
    assert [video.provenance["request"]["states"] for video in videos] == [("snow", "flowers"), ("a red ball",)]


def test_one_that_is_cancelled_leaves_before_the_next_step(mini, alone):
    calls, sizes = [], []
    counting = engine_like(mini, denoiser=Watched(mini.denoiser, lambda *given: sizes.append(len(given[2]))))
    videos = counting.run_batch(
        MIXED[:3], lambda done, total: calls.append((done, total)), lambda index: index == 0 and len(calls) == 2
    )
    assert [video is None for video in videos] == [True, False, False]
    assert sizes == [5, 5, 3, 3]
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    last = mini.run(MIXED[2]).frames
    assert np.abs(videos[2].frames.astype(int) - last.astype(int)).max() <= 1


def test_when_all_are_cancelled_no_step_is_taken(mini):
    calls = []
    counting = engine_like(mini, denoiser=Watched(mini.denoiser, lambda *given: calls.append(1)))
    assert counting.run_batch(MIXED[:2], cancelled=lambda index: True) == [None, None]
    assert not calls


def test_embeddings_ride_with_prompts(mini, tmp_path):
    from vstar_engine.prompting.embeddings import embed

    synopsis = Synopsis("snow", ("snow", "flowers"))
    (bundle,) = embed([synopsis], mini.embed, mini.text_hash, dtype=torch.float32)
    ours, theirs = request("snow", "flowers", seed=5), request("rain", seed=6)
    together = latents(mini, [ours, theirs], embeddings=[bundle, None])
    assert apart(together[0], latents(mini, [ours])[0]) < LATENTS
    assert apart(together[1], latents(mini, [theirs])[0]) < LATENTS


def test_an_encoder_may_take_the_place_of_the_text_tower(mini):
    asked = []
    mini.begin([MIXED[0], MIXED[3]], encode=lambda texts: asked.append(tuple(texts)) or mini.embed(texts))
    assert asked == [("snow", "flowers"), ("",), ("grass", "grass in snow"), ("night", "day")]


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (request("rain", frames=6), "share frames, size and steps"),
        (request("rain", steps=5), "share frames, size and steps"),
        (request("rain", tar=Tar({3: 1.0})), "level 3 does not exist"),
    ],
)
def test_requests_that_cannot_ride_together(mini, other, complaint):
    with pytest.raises(ValueError, match=complaint):
        mini.run_batch([MIXED[0], other])


def test_a_batch_of_none(mini):
    with pytest.raises(ValueError, match="no request"):
        mini.run_batch([])


def test_a_built_engine_refuses_more_rows_than_it_was_built_for(mini, tmp_path):
    built = engine_like(mini, artifact=BuiltEngine.open(engine_at(tmp_path / "engine", batch=4)))
    assert len(built.run_batch(MIXED[:2])) == 2
    with pytest.raises(EngineError, match="takes a batch of 4, got 5"):
        built.run_batch(MIXED[:3])


def test_a_batch_that_does_not_fit_is_refused_where_one_video_fits(mini, free_memory):
    many = [request("snow", seed=seed) for seed in range(16)]  # of few, decoding one takes the most
    footprints = [memory.Footprint(mini.spec, 5, *SIZE, mini.dtype, rows) for rows in (2, 32)]
    one, all_of_them = map(memory.activation_bytes, footprints)
    free_memory((one + all_of_them) // 2)
    assert mini.run(many[0]) is not None
    with pytest.raises(MemoryShortage, match="are free"):
        mini.run_batch(many)
