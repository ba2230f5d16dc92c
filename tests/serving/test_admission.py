"""Bounds, budgets and room."""

import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from vstar_engine.serving.errors import ApiError
from vstar_engine.serving.jobs.job import Job, new_id
from vstar_engine.serving.queue.admission import SETTLED, Admission
from vstar_engine.serving.settings import Settings


def refused(call, status, code):
    with pytest.raises(ApiError) as caught:
        call()
    assert (caught.value.status, caught.value.code) == (status, code)
    return caught.value


def test_bounds_are_exact_and_places_come_back():
    admission = Admission(Settings(max_queue=3, max_queue_per_key=2))
    assert admission.reserve("a", "alice")
    assert not admission.reserve("a", "alice")  # the same job again takes no second place
    assert admission.reserve("b", "alice")
    refused(lambda: admission.reserve("c", "alice"), 429, "key_queue_full")
    assert admission.reserve("d", "bob")
    error = refused(lambda: admission.reserve("e", "carol"), 429, "queue_full")
    assert int(error.headers["Retry-After"]) >= 1
    admission.release("a")
    admission.release("a")
    assert len(admission) == 2
    assert admission.reserve("c", "alice")


def test_retry_after_follows_the_pace():
    now = 0.0
    admission = Admission(Settings(max_queue=100), lambda: now)
    for number in range(5):
        admission.reserve(str(number), "alice")
    assert admission.retry_after() == 1
    for number in range(5):
        now += 7.0
        admission.release(str(number))
    assert admission.retry_after() == 7


def test_places_of_jobs_that_ended_elsewhere():
    now = 100.0
    admission = Admission(Settings(), lambda: now)
    admission.restore({"a": "alice", "b": "alice"})
    now += SETTLED + 1
    admission.reserve("c", "alice")
    admission.settle("c")
    admission.reconcile({"a": "alice"})
    assert len(admission) == 2
    assert "b" not in admission


def test_a_place_is_held_for_as_long_as_its_job_is_being_written_down():
    """A language model may think for a minute about its synopsis."""
    now = 100.0
    admission = Admission(Settings(max_queue=1), lambda: now)
    admission.reserve("a", "alice")
    now += 60
    admission.reconcile({})
    refused(lambda: admission.reserve("b", "alice"), 429, "queue_full")
    admission.settle("a")
    admission.reconcile({})
    assert "a" in admission
    now += SETTLED + 1
    admission.reconcile({})
    assert admission.reserve("b", "alice")


@pytest.mark.parametrize(
    ("limits", "settings"),
    [({"max_frames": 8}, {"frames": 9}), ({"max_steps": 10}, {"steps": 11}), ({"max_work": 1000}, {"frames": 1})],
)
def test_budgets(limits, settings):
    job = Job(**{"id": new_id(), "key_id": "", "model": "mini", "prompt": "a", "states": ("a",), "frames": 8,
                 "size": (32, 64), "created_at": 0.0, "steps": 5, **settings})  # fmt: skip
    refused(lambda: Admission(Settings(**limits)).check_budget(job), 400, "too_large")
    Admission(Settings()).check_budget(job)


def test_room_is_kept_free(tmp_path):
    (tmp_path / "videos").mkdir()
    Admission(Settings(data=tmp_path, min_free=0)).check_open()
    error = refused(Admission(Settings(data=tmp_path, min_free=2**62)).check_open, 507, "storage_full")
    assert int(error.headers["Retry-After"]) > 0


def test_a_draining_server_takes_nothing(tmp_path):
    admission = Admission(Settings(data=tmp_path))
    admission.draining = True
    refused(admission.check_open, 503, "draining")
