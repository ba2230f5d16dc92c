"""Metrics hold what happened to jobs; ids never become series."""

import time

import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from vstar_engine.serving.jobs.events import Done, Failed, Started, Step
from vstar_engine.serving.jobs.job import Job, new_id
from vstar_engine.serving.telemetry.metrics import Metrics


@pytest.fixture
def job():
    return Job(
        id=new_id(),
        key_id="key",
        model="mini",
        prompt="a lake",
        states=("a lake",),
        frames=16,
        size=(96, 128),
        created_at=time.time() - 3.0,
    )


@pytest.fixture
def metrics():
    clock = iter([10.0, 10.5, 12.5, 20.0])
    return Metrics(lambda: next(clock))


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, labels) or 0.0


def test_a_finished_job_is_counted_by_how_it_ended(metrics, job):
    metrics.accepted()
    metrics.finished(job, "cancelled", 2.0)
    metrics.finished(job, "completed", 2.5)
    metrics.refused("queue_full")
    assert value(metrics, "vstar_jobs_accepted_total") == 1
    assert value(metrics, "vstar_jobs_finished_total", status="cancelled") == 1
    assert value(metrics, "vstar_job_seconds_sum", status="completed") == 2.5
    assert value(metrics, "vstar_jobs_refused_total", code="queue_full") == 1


def test_a_start_tells_how_long_the_job_waited_and_its_batch(metrics, job):
    metrics.event(job, Started(4))
    assert value(metrics, "vstar_batch_size_sum") == 4
    assert value(metrics, "vstar_queue_seconds_sum") == pytest.approx(3.0, abs=0.5)


def test_steps_are_timed_between_their_events_and_forgotten_with_the_job(metrics, job):
    for done in (1, 2, 6, 1):  # four steps at once; then a second try begins anew
        metrics.event(job, Step(done, 25))
    assert value(metrics, "vstar_step_seconds_sum") == pytest.approx(0.5 + 0.5)
    assert value(metrics, "vstar_step_seconds_count") == 2
    assert job.id in metrics._steps
    metrics.event(job, Failed("cancelled", "as asked"))
    assert job.id not in metrics._steps


def test_a_video_tells_its_stages_and_its_real_time_factor(metrics, job):
    # four seconds of work for 16 frames at 8 a second
    metrics.event(job, Done("a.mp4", 1000, "0" * 64, 16, 128, 96, {"text": 0.5, "denoise": 3.5}))
    assert value(metrics, "vstar_stage_seconds_sum", stage="denoise") == 3.5
    assert value(metrics, "vstar_real_time_factor_sum") == pytest.approx(2.0)
    assert value(metrics, "vstar_frames_total") == 16


def test_watched_sources_are_read_when_asked(metrics):
    queue = [1, 2, 3]
    metrics.watch(queued_jobs=lambda: len(queue), worker_restarts=lambda: 2)
    assert b"vstar_queued_jobs 3.0" in metrics.render()
    queue.pop()
    assert b"vstar_queued_jobs 2.0" in metrics.render()
    assert b"vstar_worker_restarts_total 2.0" in metrics.render()
    with pytest.raises(KeyError, match="there is no metric vstar_quued_jobs"):
        metrics.watch(quued_jobs=lambda: 0)
