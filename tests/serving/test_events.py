"""What passes between server and engine survives JSON."""

import json

import pytest

from vstar_engine.config.sampling import TAR_PRESETS
from vstar_engine.serving.jobs.events import KINDS, Done, Failed, Part, Stage, Started, Step, event_from
from vstar_engine.serving.jobs.job import ID, Job, new_id, tar_from, tar_json
from vstar_engine.serving.jobs.progress import JobProgress

EVENTS = [
    Started(2),
    Stage("denoise"),
    Step(3, 25, 1.5, "data:image/jpeg;base64,AAAA"),
    Step(1, 25),
    Part(3, 25),
    Done("video_0.mp4", 10, "ab", 16, 128, 96, {"denoise": 1.0}),
    Failed("out_of_memory", "it did not fit", True),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_event_round_trip(event):
    assert event_from(json.loads(json.dumps(event.to_json()))) == event


def test_every_kind_is_tried():
    assert {event.kind for event in EVENTS} == set(KINDS)


@pytest.mark.parametrize(
    ("content", "error"), [({"kind": "nonsense"}, ValueError), ({}, ValueError), ({"kind": "stage", "nam": "x"}, TypeError)]
)
def test_other_events_are_refused(content, error):
    with pytest.raises(error):
        event_from(content)


def job(**settings):
    given = {"states": ("a", "b"), "frames": 16, "size": (96, 128), "created_at": 1.5}
    return Job(id=new_id(), key_id="k", model="mini", prompt="a to b", **(given | settings))


def test_a_step_counts_by_its_windows():
    progress = JobProgress(job(frames=1200, steps=10, window=64))
    for event, percent in [(Started(1), 0), (Part(5, 10), 5), (Step(1, 10), 10), (Part(1, 2), 15), (Step(10, 10), 99)]:
        progress.apply(event)
        assert progress.percent == percent


def test_a_long_job_is_as_much_work_as_its_windows():
    assert job(frames=240, steps=2).work == 240 * 96 * 128 * 2
    assert job(frames=240, steps=2, window=64).work == 5 * 64 * 96 * 128 * 2
    assert job(frames=240, window=64).shape != job(frames=240, window=32).shape
    assert job(blend="fifo").shape != job(blend="fifo").shape  # a queue makes one video at a time


def test_job_round_trip():
    made = job(
        tar=tar_json(TAR_PRESETS["64D1_32D8"]),
        window=8,
        overlap=3,
        noise="shared",
        at=(0, "1.875s"),
        negatives=("x", ""),
        metadata={"a": "b"},
    )
    again = Job.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made
    assert again.request() == made.request()
    assert again.request().tar == TAR_PRESETS["64D1_32D8"]
    assert again.request().at == (0, "1.875s")
    assert again.request().plan.window == 8
    assert isinstance(again.request().at[0], int)


def test_job_says_what_may_share_a_batch():
    assert job().shape == (16, (96, 128), 25, (), None, 16, "randomized") == job(seed=3, guidance=1.0, states=("c",)).shape
    assert job(fast=("step-cache",)).shape != job().shape
    assert job(steps=4).work == 16 * 96 * 128 * 4


@pytest.mark.parametrize("name", TAR_PRESETS)
def test_tar_round_trip(name):
    assert tar_from(json.loads(json.dumps(tar_json(TAR_PRESETS[name])))) == TAR_PRESETS[name]


def test_ids_are_new():
    ids = {new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(ID.fullmatch(id) for id in ids)
