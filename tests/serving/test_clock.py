"""A clock that is set while the server runs: nothing is deleted or forgotten before its time."""

import asyncio
import os
import shutil
import struct
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from support.servers import Server
from vstar_engine.serving.jobs import clock, progress, result_files
from vstar_engine.serving.jobs.job import new_id
from vstar_engine.serving.queue import retention
from vstar_engine.serving.settings import Settings

HOUR, DAY = 3600.0, 86400.0
TOLD = 5.0
# longer than from one sweep to the next
SWEPT = Settings.intervals.sweep + 5


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
    assert progress.failed("cancelled", "")["at"] == pytest.approx(before + max(jump, 0), abs=TOLD)


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
    result_files.sweep(settings.videos, "own")
    assert store.before == [pytest.approx(begun - DAY, abs=TOLD)]
    assert all(path.exists() for path in kept)


@pytest.fixture
def set_clock_of(tmp_path):
    """Returns the words that start a server whose clock can be set, and a function that sets it."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    library, offset = tmp_path / "set_clock.so", tmp_path / "offset"
    source = Path(__file__).parents[1] / "support" / "set_clock.c"
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)

    def set_to(seconds):
        with offset.open("r+b" if offset.exists() else "wb") as file:
            file.write(struct.pack("q", seconds))

    set_to(0)
    return ("env", f"LD_PRELOAD={library}", f"CLOCK_OFFSET={offset}"), set_to


@pytest.mark.reliability
def test_a_server_whose_clock_jumps(tmp_path, set_clock_of):
    """F15: days ahead, back and right again while jobs run: none is lost, stuck, or deleted before its day is over."""
    prefix, set_to = set_clock_of
    ids, phases = [], [(0, 5), (2 * DAY, SWEPT), (-2 * DAY, 10), (0, SWEPT)]
    server = Server(tmp_path / "server", "--keep-hours", "24", prefix=prefix)
    with server:
        seen = []
        for seconds, lasts in phases:
            set_to(int(seconds))
            end = time.monotonic() + lasts
            with ThreadPoolExecutor(1) as pool:
                long = pool.submit(server.create, "step=0.1", num_inference_steps=20)
                while time.monotonic() < end:
                    video = server.wait(server.create(), within=30)
                    assert video["status"] == "completed"
                    ids.append(video["id"])
                    time.sleep(0.5)
            ids.append(long.result())
            seen.append(video["created_at"] - time.time())
        videos = server.ledger(ids)
    assert [round(ahead / DAY) for ahead in seen] == [seconds / DAY for seconds, _ in phases]
    assert {video["status"] for video in videos} == {"completed"}
    print(f"{len(videos)} jobs")
