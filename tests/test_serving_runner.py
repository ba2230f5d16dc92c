"""Jobs between the store and the engine: what is tried again, and for how long."""

import asyncio

import pytest
import serve_packages  # noqa: F401 - skips where they are missing
from slow_engine import job

from vstar_engine.serving import events, runner
from vstar_engine.serving.settings import Settings

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


def made(engine, folder, **settings):
    """Runs a job and gives its outcome."""
    chosen = Settings(data=folder, min_free=0, **settings)
    chosen.videos.mkdir(parents=True)

    async def scenario():
        one = runner.Runner(engine, chosen, lambda id: None)
        one.started.set()
        return await one.make(job())

    return asyncio.run(scenario())


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(runner, "LOOK", 0.01)


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
