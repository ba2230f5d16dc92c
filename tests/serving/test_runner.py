"""Jobs between the store and the engine: what is tried again, and for how long."""

import asyncio
from types import SimpleNamespace

import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from support.slow_engine import job
from vstar_engine.config.models import MODELS
from vstar_engine.serving.http import service
from vstar_engine.serving.jobs import events
from vstar_engine.serving.queue import runner
from vstar_engine.serving.queue.stored_job import StoredJob
from vstar_engine.serving.settings import Intervals, Settings
from vstar_engine.serving.telemetry.metrics import Metrics

DONE = events.Done("video.mp4", 1, "0" * 64, 8, 64, 32)


class Engine:
    """Answers each try of a job with the next of some events."""

    def __init__(self, *answers):
        self.answers, self.tries = list(answers), 0

    async def submit(self, one):
        self.tries += 1
        yield events.Started(1)
        yield self.answers.pop(0)

    async def cancel(self, id):
        pass


def made(engine, folder, runs=1, **settings):
    """Runs a job, so many times at once, and returns its outcome."""
    chosen = Settings(data=folder, min_free=0, intervals=Intervals(storage=0.01), **settings)
    chosen.videos.mkdir(parents=True)

    async def scenario():
        one, it = runner.Runner(engine, chosen, lambda id: None, Metrics()), job()
        one.started.set()
        first, *others = await asyncio.gather(*(one.make(it) for _ in range(runs)))
        assert not one.running
        assert all(other == first for other in others)
        return first

    return asyncio.run(scenario())


@pytest.mark.parametrize("code", [events.STORAGE_FULL, events.GENERATION_FAILED])
def test_a_video_that_could_not_be_kept_is_made_again(tmp_path, code):
    """A full disk and one that fails for a while are the same to a job: it waits."""
    engine = Engine(*[events.Failed(code, "no", retry=True)] * 3, DONE)
    assert made(engine, tmp_path)["status"] == "completed"
    assert engine.tries == 4


def test_it_is_not_tried_for_ever(tmp_path):
    engine = Engine(*[events.Failed(events.GENERATION_FAILED, "no", retry=True)] * 9)
    outcome = made(engine, tmp_path, storage_wait=0.05)
    assert (outcome["status"], outcome["code"]) == ("failed", events.GENERATION_FAILED)
    assert 2 <= engine.tries < 9


def test_a_job_that_cannot_be_made_is_tried_once(tmp_path):
    engine = Engine(events.Failed(events.OUT_OF_MEMORY, "no"))
    assert made(engine, tmp_path)["code"] == events.OUT_OF_MEMORY
    assert engine.tries == 1


def test_a_run_beside_another_of_the_same_job_takes_its_outcome_over(tmp_path):
    """As where a busy server took a run for lost, and it was not: the engine refuses a job that it has."""
    engine = Engine(events.Failed(events.STORAGE_FULL, "no", retry=True), DONE)
    assert made(engine, tmp_path, runs=3)["status"] == "completed"
    assert engine.tries == 2


class Store:
    """Returns whether no job is claimed here, and what became of the one it has."""

    def __init__(self, stored):
        self.stored = stored

    async def claimed(self):
        return set()

    async def get(self, id):
        return self.stored


class Recording(runner.Runner):
    """Notes what it is to cancel."""

    def __init__(self, *collaborators):
        super().__init__(*collaborators)
        self.cancelled = []

    async def cancel(self, job):
        self.cancelled.append(job.id)


@pytest.mark.parametrize(
    ("status", "stopped"),
    [("queued", False), ("completed", False), ("failed", True), ("gone", True)],
    ids=lambda value: str(value),
)
def test_a_run_without_a_claim_stops_where_its_job_was_cancelled_elsewhere(tmp_path, status, stopped):
    settings, one = Settings(data=tmp_path, intervals=Intervals(lost_after=0.0)), job()
    gateway = service.Service(settings, Engine(), SimpleNamespace(spec=MODELS["mini"]), Recording)
    outcomes = {"queued": None, "completed": {"status": "completed"}, "failed": {"status": "failed"}}
    gateway.store = Store(StoredJob(one, 0, outcomes[status]) if status in outcomes else None)
    gateway.runner.running[one.id] = one
    asyncio.run(gateway._check_runs())
    assert gateway.runner.cancelled == ([one.id] if stopped else [])
