"""The store's folder and file, and what the sweeper takes away."""

import asyncio
import os
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from dbos._serialization import DBOSDefaultSerializer
from dbos._sys_db import SystemDatabase
from sqlalchemy.exc import InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection

import support.serve_packages  # noqa: F401 - skips where they are missing
from vstar_engine.serving.jobs.job import Job, new_id
from vstar_engine.serving.queue import dbos_patches, retention, sqlite
from vstar_engine.serving.queue.errors import Stopped, StoreError
from vstar_engine.serving.queue.store import JobStore, _moment, sqlite_path
from vstar_engine.serving.settings import Settings


def test_a_second_server_is_kept_out(tmp_path):
    first, second = (JobStore(Settings(data=tmp_path), "mini") for _ in range(2))
    first.open()
    with pytest.raises(StoreError, match="another server uses"):
        second.open()
    first.close()
    second.open()
    second.close()


def test_a_damaged_database_is_refused(tmp_path):
    (tmp_path / "jobs.sqlite").write_bytes(b"SQLite format 3\0" + b"\xff" * 8192)
    store = JobStore(Settings(data=tmp_path), "mini")
    with pytest.raises(StoreError, match=r"is damaged, move it away: .* videos are kept in .*unknown"):
        store.open()
    store.close()


@pytest.mark.parametrize("kind", [OperationalError, InternalError, NoConnection])
def test_an_outcome_waits_for_the_database(kind):
    """A failure to write it is not the job's: DBOS would write that down next, and the job had failed for good."""
    failures = [kind("", {}, sqlite3.OperationalError("disk I/O error"))] * 3

    def write(id, status):
        if failures:
            raise failures.pop()
        return id, status

    write = dbos_patches.retried(write, lambda: False, pause=0.0)
    assert write("video_1", status="SUCCESS") == ("video_1", "SUCCESS")


def test_an_outcome_waits_no_longer_than_the_server_lives():
    stopping = []

    def write():
        stopping.append(True)
        raise OperationalError("", {}, sqlite3.OperationalError("disk I/O error"))

    with pytest.raises(Stopped):
        dbos_patches.retried(write, lambda: bool(stopping), pause=0.0)()


def test_what_is_patched_is_there():
    assert all(callable(getattr(SystemDatabase, name)) for name in dbos_patches.OUTCOME_WRITES)
    assert callable(DBOSDefaultSerializer.deserialize)


def test_urls():
    assert str(sqlite_path("sqlite:////a/b")) == "/a/b"
    assert sqlite_path("postgresql://me@host/jobs") is None
    with pytest.raises(StoreError, match="is a URL"):
        sqlite_path("jobs")


@pytest.mark.parametrize("milliseconds", [1, 1795276799001, 1795276799999])
def test_a_moment_is_exact(milliseconds):
    """DBOS reads it back through a float, and cuts."""
    from datetime import datetime

    assert int(datetime.fromisoformat(_moment(milliseconds)).timestamp() * 1000) == milliseconds


class Callbacks:
    """A server whose jobs never end."""

    stopping = False

    async def make(self, job):
        await asyncio.Event().wait()


@pytest.mark.parametrize("newest_first", [False, True])
def test_a_list_is_in_order_within_a_second(newest_first, tmp_path):
    """The database may know whole seconds only."""
    times = [10.1, 10.3, 10.2, 11.5, 10.9]
    jobs = [
        Job(id=new_id(), key_id="me", model="mini", prompt="", states=("a",), frames=8, size=(32, 64), created_at=at)
        for at in times
    ]

    async def listed():
        kept = JobStore(Settings(data=tmp_path), "mini")
        kept.open()
        await kept.start(Callbacks(), lambda: False)
        try:
            for job in jobs:
                await kept.add(job, at_once=False)
            with sqlite3.connect(tmp_path / "jobs.sqlite") as database:
                for job in jobs:
                    when = (int(job.created_at) * 1000, job.id)
                    database.execute("UPDATE workflow_status SET created_at = ? WHERE workflow_uuid = ?", when)
            seen, more = [], True
            while more:
                cursor = await kept.cursor("me", seen[-1].job.id) if seen else None
                page, more = await kept.page("me", cursor, 2, newest_first)
                seen += page
            return seen
        finally:
            await kept.stop()
            kept.close()

    assert [stored.job.created_at for stored in asyncio.run(listed())] == sorted(times, reverse=newest_first)


def test_commits_share_a_wait_for_the_disk(tmp_path):
    path = tmp_path / "jobs.sqlite"
    sqlite.prepare(path)
    connection = sqlite3.connect(path, factory=sqlite.Connection)
    assert connection.execute("PRAGMA synchronous").fetchone() == (1,)
    connection.execute("CREATE TABLE kept (value)")
    waits, lock = [], threading.Lock()

    def slow(descriptor):
        with lock:
            waits.append(descriptor)
        time.sleep(0.02)
        os.fsync(descriptor)

    disk = sqlite.Disk(path, fsync=slow)

    async def sixteen():
        await asyncio.gather(*(disk.sync() for _ in range(16)))

    asyncio.run(sixteen())
    assert len(waits) in (2, 4)  # the log and the folder, once or, for those who came late, twice
    disk.close()
    connection.close()


def test_writers_take_turns(tmp_path):
    """A turn lasts as long as a transaction; whoever fails, takes back or is closed gives it on."""
    path = tmp_path / "jobs.sqlite"
    sqlite.prepare(path)

    def connected():
        held = sqlite3.connect(path, factory=sqlite.Connection, isolation_level="IMMEDIATE", timeout=30)
        return held, held.cursor()

    one, first = connected()
    first.execute("CREATE TABLE kept (value UNIQUE)")
    for end in (one.commit, one.rollback):
        assert not sqlite._turn.locked()
        first.execute("INSERT INTO kept VALUES (-1)")
        assert sqlite._turn.locked()
        first.execute("DELETE FROM kept")
        assert sqlite._turn.locked()
        end()
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        first.execute("INSERT INTO missing VALUES (1)")
    one.rollback()
    assert first.execute("SELECT count(*) FROM kept").fetchone() == (0,)
    assert not sqlite._turn.locked()
    closed, others = connected()
    others.executemany("INSERT INTO kept VALUES (?)", [(-2,), (-3,)])
    assert sqlite._turn.locked()
    others.close()
    closed.close()

    def write(number):
        held, cursor = connected()
        for i in range(20):
            cursor.execute("INSERT INTO kept VALUES (?)", (100 * number + i,))
            cursor.execute("UPDATE kept SET value = value WHERE value = ?", (100 * number + i,))
            held.commit()
        held.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert first.execute("SELECT count(*) FROM kept").fetchone() == (160,)
    assert not sqlite._turn.locked()


def test_a_disk_that_fails_says_so(tmp_path, monkeypatch):
    path = tmp_path / "jobs.sqlite"
    sqlite.prepare(path)
    disk = sqlite.Disk(path)
    with pytest.raises(sqlite.DiskError):
        asyncio.run(disk.sync())
    disk.close()


class Kept:
    """A store of ended jobs, the oldest first: ids with the time of their end."""

    def __init__(self, ends):
        self.ends, self.failed = ends, set()

    async def ended(self, before=None, limit=100):
        return [id for id, end in self.ends.items() if before is None or end <= before][:limit]

    async def delete(self, ids):
        for id in ids:
            del self.ends[id]

    async def known(self, ids):
        return {id: id not in self.failed for id in ids if id in self.ends}


@pytest.fixture
def kept(tmp_path):
    """Four videos of 1000 bytes, an hour apart."""
    (tmp_path / "videos").mkdir()
    ids = [new_id() for _ in range(4)]
    for id in ids:
        (tmp_path / "videos" / f"{id}.mp4").write_bytes(b"x" * 990)
        (tmp_path / "videos" / f"{id}.jpg").write_bytes(b"x" * 10)
    return Kept({id: time.time() - 3600 * (4 - i) for i, id in enumerate(ids)})


@pytest.mark.parametrize(
    ("settings", "left"), [({}, 4), ({"keep_for": 2.5 * 3600}, 2), ({"keep_bytes": 3999}, 3), ({"keep_bytes": 1}, 0)]
)
def test_what_is_kept(kept, tmp_path, settings, left):
    ids = list(kept.ends)
    forgotten = []
    asyncio.run(retention.sweep(kept, Settings(data=tmp_path, **settings), forgotten.append))
    assert forgotten == ids[: 4 - left]
    assert list(kept.ends) == ids[4 - left :]
    assert {path.name for path in (tmp_path / "videos").iterdir()} == {
        f"{i}{end}" for i in kept.ends for end in (".mp4", ".jpg")
    }


def test_files_that_the_database_does_not_know_are_set_aside_and_that_is_said(kept, tmp_path, caplog):
    """It may be a new one, and they all that is left of the videos before."""
    folder, old, young = tmp_path / "videos", new_id(), new_id()
    for id in (old, young):
        (folder / f"{id}.mp4").write_bytes(b"x" * 50)
    os.utime(folder / f"{old}.mp4", (0, 0))
    (folder / "README").touch()
    asyncio.run(retention.sweep(kept, Settings(data=tmp_path), list))
    assert (folder / "unknown" / f"{old}.mp4").read_bytes() == b"x" * 50
    assert not (folder / f"{old}.mp4").exists()
    assert (folder / f"{young}.mp4").exists()
    assert (folder / "README").exists()
    assert retention.stored(folder) == 4100
    assert f"moved 1 files of jobs that the database does not know to {folder / 'unknown'}" in caplog.text


@pytest.mark.parametrize(("settings", "left"), [({"keep_for": 3600}, 0), ({"keep_bytes": 4050}, 1), ({"keep_bytes": 9999}, 2)])
def test_what_was_set_aside_is_kept_no_longer_than_videos(tmp_path, settings, left, caplog):
    caplog.set_level("INFO", logger="vstar_engine")
    aside = tmp_path / "videos" / "unknown"
    aside.mkdir(parents=True)
    for number, size in enumerate((3000, 2000)):
        (aside / f"{number}.mp4").write_bytes(b"x" * size)
        os.utime(aside / f"{number}.mp4", (number, number))
    asyncio.run(retention.sweep(Kept({}), Settings(data=tmp_path, **settings), list))
    assert [path.name for path in sorted(aside.iterdir())] == ["0.mp4", "1.mp4"][2 - left :]
    assert ("set aside by age or quota" in caplog.text) == (left < 2)


def test_what_a_job_without_a_video_left_goes_at_once(kept, tmp_path, caplog):
    caplog.set_level("INFO", logger="vstar_engine")
    failed = list(kept.ends)[1]
    kept.failed.add(failed)
    asyncio.run(retention.sweep(kept, Settings(data=tmp_path), list))
    assert not list((tmp_path / "videos").glob(f"{failed}*"))
    assert retention.stored(tmp_path / "videos") == 3000
    assert "removed the files of 1 jobs without a video" in caplog.text
