"""A clock that is set while the server runs: nothing is deleted or forgotten before its time."""

import asyncio
import os
import time

import pytest
import serve_packages  # noqa: F401 - skips where they are missing

from vstar_engine.serving import clock, live, results, retention
from vstar_engine.serving.job import new_id
from vstar_engine.serving.settings import Settings

HOUR, DAY = 3600.0, 86400.0
TOLD = 5.0


@pytest.fixture
def set_clock(monkeypatch):
    """Sets the clock by so many seconds from what it shows."""
    wall = time.time
    return lambda seconds: monkeypatch.setattr(time, "time", lambda: wall() + seconds)


def test_a_clock_that_nobody_sets_is_followed():
    assert abs(clock.now() - time.time()) < TOLD
    assert abs(clock.stamp() - time.time()) < TOLD


@pytest.mark.parametrize("jump", [2 * DAY, -2 * DAY])
def test_a_clock_that_is_set_makes_nothing_older(set_clock, jump):
    before = time.time()
    set_clock(jump)
    assert abs(clock.now() - (before + min(jump, 0))) < TOLD
    assert abs(clock.stamp() - (before + max(jump, 0))) < TOLD
    assert live.failed("cancelled", "")["at"] == pytest.approx(before + max(jump, 0), abs=TOLD)


class Asked:
    """A store that notes which ends the sweep asks for."""

    def __init__(self):
        self.before = []

    async def ended(self, before=None, limit=100):
        self.before.append(before)
        return []

    async def known(self, ids):
        return {}


def test_a_clock_that_is_set_ahead_deletes_nothing(tmp_path, set_clock):
    settings, store = Settings(data=tmp_path, keep_for=DAY), Asked()
    young, half, aside = new_id(), ".video_a.mp4.another.partial.mp4", settings.videos / "unknown" / f"{new_id()}.mp4"
    aside.parent.mkdir(parents=True)
    kept = [settings.videos / f"{young}.mp4", settings.videos / half, aside]
    for path in kept:
        path.write_bytes(b"a video")
        os.utime(path, (time.time() - 60, time.time() - 60))
    begun = time.time()
    set_clock(2 * DAY)
    asyncio.run(retention.sweep(store, settings, list))
    results.sweep(settings.videos, "own")
    assert store.before == [pytest.approx(begun - DAY, abs=TOLD)]
    assert all(path.exists() for path in kept)
