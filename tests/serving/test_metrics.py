"""Metrics hold what happened to jobs; ids never become series."""

import time

import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from vstar_engine.serving.jobs.events import Done, Failed, Started, Step
from vstar_engine.serving.jobs.job import Job, new_id
from vstar_engine.serving.telemetry import metrics


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


def value(name, **labels):
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


def growth(name, act, **labels):
    before = value(name, **labels)
    act()
    return value(name, **labels) - before


def test_a_finished_job_is_counted_by_how_it_ended(job):
    assert growth("vstar_jobs_accepted_total", lambda: metrics.accepted(job)) == 1
    assert growth("vstar_jobs_finished_total", lambda: metrics.finished(job, "cancelled", 2.0), status="cancelled") == 1
    assert growth("vstar_job_seconds_sum", lambda: metrics.finished(job, "completed", 2.5), status="completed") == 2.5
    assert growth("vstar_jobs_refused_total", lambda: metrics.refused("queue_full"), code="queue_full") == 1


def test_a_start_tells_how_long_the_job_waited_and_its_batch(job):
    def start():
        metrics.event(job, Started(4))

    assert growth("vstar_batch_size_sum", start) == 4
    assert growth("vstar_queue_seconds_sum", start) == pytest.approx(3.0, abs=0.5)


def test_steps_are_timed_between_their_events_and_forgotten_with_the_job(job, monkeypatch):
    clock = iter([10.0, 10.5, 12.5, 20.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))

    def steps():
        for done in (1, 2, 6, 1):  # four steps at once; then a second try begins anew
            metrics.event(job, Step(done, 25))

    before = value("vstar_step_seconds_count")
    assert growth("vstar_step_seconds_sum", steps) == pytest.approx(0.5 + 0.5)
    assert value("vstar_step_seconds_count") == before + 2
    assert job.id in metrics._steps
    metrics.event(job, Failed("cancelled", "as asked"))
    assert job.id not in metrics._steps


def test_a_video_tells_its_stages_and_its_real_time_factor(job):
    # four seconds of work for 16 frames at 8 a second
    done = Done("a.mp4", 1000, "0" * 64, 16, 128, 96, {"text": 0.5, "denoise": 3.5})
    assert growth("vstar_stage_seconds_sum", lambda: metrics.event(job, done), stage="denoise") == 3.5
    assert growth("vstar_real_time_factor_sum", lambda: metrics.event(job, done)) == pytest.approx(
        2.0
    )  # 4 s for 16 frames at 8
    assert growth("vstar_frames_total", lambda: metrics.event(job, done)) == 16


def test_watched_sources_are_read_when_asked(monkeypatch):
    monkeypatch.setattr(metrics.WATCHING, "sources", {})
    queue = [1, 2, 3]
    metrics.watch(queued_jobs=lambda: len(queue), worker_restarts=lambda: 2)
    assert b"vstar_queued_jobs 3.0" in metrics.render()
    queue.pop()
    assert b"vstar_queued_jobs 2.0" in metrics.render()
    assert b"vstar_worker_restarts_total 2.0" in metrics.render()
    with pytest.raises(KeyError, match="there is no metric vstar_quued_jobs"):
        metrics.watch(quued_jobs=lambda: 0)
