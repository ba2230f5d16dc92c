"""The real engine in a worker: its cache of embeddings, previews, bundles, and a whole video through the child process."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from support.denoisers import Watched
from support.engines import engine_at, engine_like
from support.slow_engine import job
from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.prompting.embeddings import embed
from vstar_engine.prompting.synopsis import Synopsis
from vstar_engine.serving.jobs import events
from vstar_engine.serving.workers.dispatch_state import BatchingPolicy
from vstar_engine.serving.workers.engine_renderer import EngineRenderer, TextCache
from vstar_engine.serving.workers.job_checkpoints import JobCheckpoints
from vstar_engine.serving.workers.local_process import ProcessEngine

SIZE = (32, 64)


def encode(texts):
    return torch.tensor([float(len(text)) for text in texts])[:, None, None].expand(-1, 2, 3).contiguous()


def test_the_cache_keeps_what_was_used_last_within_its_bytes():
    cache = TextCache(encode, most=3 * 24)
    for texts in (["a"], ["bb"], ["ccc"], ["a"], ["dddd"], ["a"], ["bb"]):
        assert torch.equal(cache(texts), encode(texts))
    assert (cache.hits, cache.misses) == (2, 5)
    assert cache.bytes == 3 * 24
    assert list(cache.kept) == [("dddd",), ("a",), ("bb",)]


def test_the_cache_keeps_nothing_larger_than_itself():
    cache = TextCache(encode, most=3 * 24)
    cache(["a"])
    assert len(cache(["b"] * 4)) == 4
    assert list(cache.kept) == [("a",)]


def test_a_job_hears_the_same_from_the_cache(mini):
    model = EngineRenderer(mini)
    first, again = (model.begin([job("snow", steps=1)]).rows[0] for _ in range(2))
    assert torch.equal(first.context, again.context)
    assert model.counters()["cache_hits"] == 2


def test_facts_and_buckets_of_the_model(mini):
    model = EngineRenderer(mini)
    facts = model.facts()
    assert {*events.FACTS} - facts.keys() == {"batch_limits", "step_seconds", "counters"}
    assert facts["size"] == [96, 128]
    assert model.buckets() == [(16, 96, 128)]


def test_a_preview_looks_like_the_video(mini):
    model = EngineRenderer(mini)
    batch = model.begin([job("a red and blue landscape", steps=4, frames=4, seed=3)])
    assert model.preview(batch.rows[0]) is None
    for _ in range(batch.steps):
        model.step(batch)
    row = batch.rows[0]
    video = model.finish(batch, row)
    model.learn_colours(row, video)
    strip = model.preview(row).astype(float)
    assert strip.shape == (4, 4 * 8, 3)
    seen = video.frames.reshape(4, 4, 8, 8, 8, 3).mean(axis=(2, 4))  # (T, h, w, 3)
    expected = np.concatenate(list(seen), axis=1)
    # a plain grey strip would be as far off as the colours spread
    assert np.abs(strip - expected).mean() < 0.6 * np.abs(expected - expected.mean()).mean()


def test_an_engine_built_for_one_row_takes_guidance_in_two_passes(mini, tmp_path):
    built = engine_like(mini, artifact=BuiltEngine.open(engine_at(tmp_path / "engine", batch=1, size=list(SIZE))))
    model, sizes = EngineRenderer(built), []
    assert model.most_at_once() == 1
    batch = model.begin([job("snow", steps=1)])
    batch.denoiser = Watched(mini.denoiser, lambda *given: sizes.append(len(given[2])))
    model.step(batch)
    assert sizes == [1, 1]


def test_a_built_engine_says_what_it_takes(mini, tmp_path):
    artifact = BuiltEngine.open(engine_at(tmp_path / "engine", batch=8, size=list(SIZE), frames=[16, 64]))
    model = EngineRenderer(engine_like(mini, artifact=artifact))
    assert model.most_at_once() == 4
    assert model.buckets() == [(16, *SIZE), (64, *SIZE)]
    assert (model.facts()["max_frames"], model.facts()["backend"]) == (64, "inductor")


def test_a_job_is_sampled_as_it_says(mini):
    model, asked = EngineRenderer(mini), job("snow", steps=3, frames=3, fast=("step-cache",))
    batch = model.begin([asked])
    for _ in range(batch.steps):
        model.step(batch)
    exact, fast = (mini.run(replace(asked, fast=names).request()).frames for names in ((), ("step-cache",)))
    assert np.array_equal(model.finish(batch, batch.rows[0]).frames, fast)
    assert not np.array_equal(exact, fast)


def test_a_long_job_goes_on_where_it_was(mini, tmp_path):
    asked = job("snow", steps=4, frames=8, window=4, overlap=2)
    whole = mini.run(asked.request()).frames
    first = EngineRenderer(mini, checkpoints=JobCheckpoints(tmp_path))
    batch = first.begin([asked])
    for _ in range(3):
        first.step(batch)
    again = EngineRenderer(mini, checkpoints=JobCheckpoints(tmp_path))
    batch = again.begin([asked])
    assert batch.done == 2
    for _ in range(batch.steps - batch.done):
        again.step(batch)
    np.testing.assert_array_equal(again.finish(batch, batch.rows[0]).frames, whole)
    assert list(tmp_path.iterdir()) == []
    assert again.begin([job("snow", steps=4, frames=4)]).done == 0  # one pass keeps none


def test_a_checkpoint_that_does_not_fit_costs_no_job(mini, tmp_path, caplog):
    asked = job("snow", steps=2, frames=8, window=4, overlap=2)
    for place in range(12):
        (tmp_path / f"old{place}.checkpoint").write_bytes(b"")
    (tmp_path / f"{asked.id}.checkpoint").write_bytes(b"cut short")
    model = EngineRenderer(mini, checkpoints=JobCheckpoints(tmp_path))
    assert model.begin([asked]).done == 0
    assert "begins anew" in caplog.text
    assert len(list(tmp_path.iterdir())) < 8


def test_bundles_are_found_by_their_id(mini, tmp_path):
    (bundle,) = embed([Synopsis("snow", ("snow", "flowers"))], mini.embed, mini.text_hash, dtype=torch.float32)
    bundle.save(tmp_path / "seasons.safetensors")
    asked = job("snow", steps=1, embeddings="seasons")
    named = type(asked)(**{**vars(asked), "states": ("snow", "flowers")})
    row = EngineRenderer(mini, tmp_path).begin([named]).rows[0]
    assert row.held.file.endswith("seasons.safetensors")


@pytest.mark.parametrize("id", ["../seasons", "absent", ""])
def test_bundles_that_are_not_there(mini, tmp_path, id):
    with pytest.raises(ValueError, match=r"no embeddings|not a whole bundle"):
        EngineRenderer(mini, tmp_path / "bundles").begin([job(embeddings=id)])


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
    ids=str,
)
def test_shortages_are_told_from_faults(mini, error, short):
    assert EngineRenderer(mini).is_shortage(error) is short


def test_videos_from_the_child_are_those_of_the_engine(mini, tmp_path):
    jobs = [
        job(prompt, seed=seed, frames=5, steps=3, guidance=guidance)
        for prompt, seed, guidance in (("snow", 4, 6.0), ("rain", 5, 1.0))
    ]
    policy = BatchingPolicy(buckets=((5, *SIZE),), max_batch=2, batch_delay=1.0, short_job_share=0.0)

    async def events_of(engine, one):
        return [event async for event in engine.submit(one)]

    async def scenario():
        engine = ProcessEngine(tmp_path, {"engine": {"model": "mini"}}, policy)
        async with asyncio.timeout(240):
            await engine.start()
            found = await asyncio.gather(*(events_of(engine, one) for one in jobs)), engine.facts()
            await engine.close(0)
        return found

    found, facts = asyncio.run(scenario())
    assert facts["batch_limits"].keys() == {"5x32x64"}
    assert facts["device"] == "cpu"
    for one, received in zip(jobs, found, strict=True):
        assert isinstance(received[-1], events.Done)
        ours = frames_of(tmp_path / received[-1].file)
        theirs = frames_of(mini.run(one.request()).save(tmp_path / "alone.mp4"))
        # a byte of rounding where they were batched, doubled by the codec
        assert np.abs(ours - theirs).max() <= 2


def frames_of(path):
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)
