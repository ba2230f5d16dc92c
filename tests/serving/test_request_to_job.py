"""From bodies to jobs: defaults, units, states and what they may not be."""

import asyncio

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import support.serve_packages  # noqa: F401 - skips where they are missing
from vstar_engine.config.models import MODELS
from vstar_engine.config.sampling import TAR_PRESETS, Sampling, Tar
from vstar_engine.errors import EndpointError
from vstar_engine.prompting.embeddings import Embeddings
from vstar_engine.prompting.synopsis import Synopsis
from vstar_engine.serving.errors import ApiError
from vstar_engine.serving.http.request_to_job import Resolver, bundle_path, fingerprint, remixed, tar_from_body
from vstar_engine.serving.http.schema import CreateVideo, TarSettings
from vstar_engine.serving.jobs.job import Job, tar_from

RESOLVER = Resolver(MODELS["mini"])


def job_of(resolver=RESOLVER, **fields):
    body = CreateVideo.model_validate({"prompt": "a tree", **fields}, strict=True)
    plain = resolver.plain(body, body.prompt, "alice", fingerprint("create", body))
    return asyncio.run(resolver.with_states(plain, body))


def test_defaults_are_the_engines():
    job = job_of(enhance_prompt=False)
    request = job.request()
    assert (request.frames, request.size, request.fps, request.sampling.steps) == (64, (96, 128), 8.0, 25)
    assert (request.tar, request.states, job.synopsis_source) == (Tar(), ("a tree",), "prompt")


def test_what_the_server_samples_with_where_a_body_does_not_say():
    few = Resolver(MODELS["mini"], sampling=Sampling.usual(("few-step",)))
    job = job_of(few)
    assert job.request().sampling == Sampling.few()
    assert Job.from_json(job.to_json()) == job
    assert (job_of(few).tar["until_step"], job_of(few, num_inference_steps=8).tar["until_step"]) == (1, 3)
    assert job_of(few, num_inference_steps=8, guidance_scale=1.5).request().sampling == Sampling.few(steps=8, guidance=1.5)
    with pytest.raises(ApiError, match="few-step takes 1 to 50 steps, got 60"):
        job_of(few, num_inference_steps=60)
    cached = Resolver(MODELS["mini"], sampling=Sampling.usual(("step-cache",)))
    assert job_of(cached).shape != job_of().shape


def test_size_is_width_first():
    assert job_of(size="160x96").size == (96, 160)


@pytest.mark.parametrize(
    ("fields", "frames"),
    [({"seconds": "4"}, 32), ({"seconds": 2}, 16), ({"seconds": 2, "fps": 10.0}, 20), ({"seconds": 2, "num_frames": 5}, 5)],
)
def test_length(fields, frames):
    assert job_of(**fields).frames == frames


def test_states_with_places_durations_and_negatives():
    states = [{"text": "a", "at": 0, "negative": "b"}, {"text": "c", "at": "50%"}, {"text": "d", "at": 1.0}]
    job = job_of(synopsis=states, negative_prompt="e")
    assert (job.at, job.negatives, job.negative) == ((0, 0.5, 1.0), ("b", "e", "e"), "")
    job = job_of(subprompts=[{"text": "a", "duration": 2.0}, {"text": "b"}], num_frames=9, spread="ease")
    assert (job.durations, job.request().anchors, job.mode) == ((2.0,), [0, 8], "ease")


@pytest.mark.parametrize("name", TAR_PRESETS)
def test_presets(name):
    assert tar_from_body(name, 25) == TAR_PRESETS[name]
    assert tar_from_body(TarSettings(preset=name), 25) == TAR_PRESETS[name]


@pytest.mark.parametrize(
    ("given", "tar"),
    [
        (None, Tar()),
        ({"sigma": 3.0}, Tar({0: 3.0, 1: 8.0})),
        ({"sigma": {"1": 3.0}, "preset": "64D8"}, Tar({0: 8.0, 1: 3.0})),
        ({"sigma": {"0": 2.0}, "preset": "none"}, Tar({0: 2.0})),
        ({"strength": 0.5}, Tar(strength=0.5)),
        ({"until": 4}, Tar(until_step=4)),
        ({"until": "56%"}, Tar(until_step=13)),
        ({"until": "0%"}, Tar(until_step=-1)),
    ],
)
def test_single_settings_of_tar(given, tar):
    assert tar_from_body(None if given is None else TarSettings(**given), 25) == tar


@given(
    st.dictionaries(st.sampled_from(["0", "1", "2"]), st.floats(0.01, 100), min_size=1), st.floats(-2, 2), st.integers(-1, 30)
)
def test_tar_survives_a_remix(sigma, strength, until):
    job = job_of(enhance_prompt=False, seed=3, tar={"sigma": sigma, "strength": strength, "until": until}, guidance_scale=1.5)
    again = remixed(job, CreateVideo(prompt="b", enhance_prompt=False), "b")
    made = RESOLVER.plain(again, "b", "alice", "")
    assert tar_from(made.tar) == tar_from(job.tar)
    assert (made.seed, made.frames, made.size, made.guidance, made.states) == (3, job.frames, job.size, 1.5, ("b",))


class Told:
    """A language model that says two states, or nothing."""

    def __init__(self, states=("a bud", "a flower")):
        self.said = states

    def states(self, prompt, count, most):
        if not self.said:
            raise EndpointError("no answer")
        return self.said


def test_a_language_model_describes_the_states():
    resolver = Resolver(MODELS["mini"], llm=Told())
    job = job_of(resolver)
    assert (job.states, job.synopsis_source, job.prompt) == (("a bud", "a flower"), "llm", "a tree")
    assert job_of(resolver, enhance_prompt=False).states == ("a tree",)
    assert job_of(resolver, synopsis=["b"]).states == ("b",)
    silent = Resolver(MODELS["mini"], enhance=False, llm=Told())
    assert job_of(silent).states == ("a tree",)
    assert job_of(silent, enhance_prompt=True).synopsis_source == "llm"


def test_a_language_model_that_fails():
    assert job_of(Resolver(MODELS["mini"], llm=Told(()))).synopsis_source == "prompt"
    with pytest.raises(ApiError, match="gives no answer") as caught:
        job_of(Resolver(MODELS["mini"], llm=Told(()), llm_required=True))
    assert (caught.value.status, caught.value.code) == (503, "prompt_not_enhanced")


def bundle(tmp_path, states=("a", "b"), spec=MODELS["mini"]):
    shape = (spec.text.context_length, spec.unet.context_dim)
    anchors, negative = torch.zeros(len(states), *shape), torch.zeros(1, *shape)
    Embeddings(Synopsis("a to b", states, at=(0, 1.0)), anchors, negative, "blurry", "0" * 64, "0" * 64).save(
        tmp_path / "winter.safetensors"
    )
    return Resolver(spec, bundles=tmp_path)


def test_a_bundle_brings_its_states(tmp_path):
    body = CreateVideo(embeddings="winter")
    resolver = bundle(tmp_path)
    plain = resolver.plain(body, None, "alice", "")
    job = asyncio.run(resolver.with_states(plain, body))
    assert (job.states, job.at, job.negative, job.prompt) == (("a", "b"), (0, 1.0), "blurry", "a to b")
    assert Job.from_json(job.to_json()) == job
    for bad in ("other", "../winter"):
        with pytest.raises(ApiError, match="no embeddings"):
            resolver.bundle(bad)
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ApiError, match="damaged"):
        resolver.bundle("broken")


@given(st.text(max_size=30))
def test_no_id_leaves_the_folder(id):
    path = bundle_path(RESOLVER.bundles, id)
    assert path is None


def test_equal_bodies_have_equal_fingerprints():
    one, same, other = (CreateVideo(prompt="a", seed=seed) for seed in (1, 1, 2))
    assert fingerprint("create", one) == fingerprint("create", same) != fingerprint("create", other)
    assert fingerprint("remix x", one) != fingerprint("create", one)


def test_a_seed_of_minus_one_is_drawn():
    job = job_of(seed=-1)
    assert 0 <= job.seed < 2**32
    assert job_of(seed=-1).seed != job.seed
    again = remixed(job, CreateVideo(prompt="b", seed=-1), "b")
    assert RESOLVER.plain(again, "b", "alice", "").seed != job.seed
