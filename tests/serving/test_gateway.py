"""The gateway in this process, with the real store and an engine that the test plays: what is told when, and what is left."""

import asyncio
import sqlite3
import threading
import time
from dataclasses import replace

import pytest
from dbos._sys_db import SystemDatabase
from sqlalchemy.exc import InternalError

import support.serve_packages  # noqa: F401 - skips where they are missing
from support.gateway import LIMIT, OWNER, ScriptedEngine, connected, created, ended, left, scenario
from support.slow_engine import until
from vstar_engine.errors import DeviceError, VstarError
from vstar_engine.serving.http import service
from vstar_engine.serving.http.schema import CreateVideo
from vstar_engine.serving.http.service import Caller
from vstar_engine.serving.jobs import events, result_files
from vstar_engine.serving.jobs.job import new_id
from vstar_engine.serving.jobs.progress import failed
from vstar_engine.serving.queue.runner import Runner
from vstar_engine.serving.settings import Intervals


@pytest.fixture
def held(monkeypatch):
    """Holds the write that ends a job until it is let go."""
    begun, go = threading.Event(), threading.Event()
    write = SystemDatabase.update_workflow_outcome

    def wait_and_write(self, *args, **values):
        begun.set()
        assert go.wait(LIMIT)
        return write(self, *args, **values)

    monkeypatch.setattr(SystemDatabase, "update_workflow_outcome", wait_and_write)
    yield begun, go
    go.set()


def test_an_end_is_told_when_the_database_has_it(tmp_path, held):
    """Else a kill in between takes it back: completed, queued, completed."""
    begun, go = held

    async def act(gateway, engine):
        id = await created(gateway, engine)
        engine.end(id)
        await until(begun.is_set)
        await asyncio.sleep(0.2)
        before = gateway.show(await gateway.get(OWNER, id)).status
        go.set()
        outcome = await ended(gateway, id)
        return before, outcome["status"], gateway.show(await gateway.get(OWNER, id)).status

    assert scenario(tmp_path, act) == ("in_progress", "completed", "completed")


@pytest.mark.parametrize("how", ["cancelled elsewhere", "deleted"])
def test_an_end_that_comes_too_late_leaves_nothing(tmp_path, held, how):
    """The database took another server's word first: no end is told but that, and no file stays."""
    begun, go = held

    async def act(gateway, engine):
        id = await created(gateway, engine)
        engine.end(id)
        await until(begun.is_set)
        if how == "deleted":
            await gateway.delete(OWNER, id)
        else:
            await gateway.store.cancel(id)
        go.set()
        await until(lambda: not left(gateway))
        if how == "deleted":
            return await gateway.store.get(id), gateway.runner.tracker[id]
        return (await ended(gateway, id))["code"], gateway.runner.tracker[id].outcome["code"]

    assert scenario(tmp_path, act) == ((None, None) if how == "deleted" else ("cancelled", "cancelled"))


def test_a_job_that_fails_leaves_nothing(tmp_path):
    """As where the worker died three times while it wrote."""

    async def act(gateway, engine):
        id = await created(gateway, engine)
        assert left(gateway) == sorted(result_files.names(id))
        engine.end(id, events.Failed(events.WORKER_CRASHED, "it died"))
        return (await ended(gateway, id))["code"], left(gateway)

    assert scenario(tmp_path, act) == ("worker_crashed", [])


def test_what_a_job_left_that_the_database_gave_up_is_swept(tmp_path, monkeypatch):
    """As where the server died a hundred times, or a job was cancelled at the other of two servers."""

    async def act(gateway, engine):
        done, given_up = await created(gateway, engine), None
        engine.end(done)
        await ended(gateway, done)
        given_up = await created(gateway, engine)
        await gateway.store.cancel(given_up)
        await service.retention.sweep(gateway.store, gateway.settings, lambda id: None)
        return left(gateway), sorted(result_files.names(done))

    found, wanted = scenario(tmp_path, act)
    assert found == wanted


def test_an_end_is_as_old_as_was_told(tmp_path):
    """The database's clock may have been behind when it was recorded; its stamp alone would delete the video too early."""

    async def act(gateway, engine):
        ids = [await created(gateway, engine) for _ in range(3)]
        for id in ids:
            engine.end(id)
            await ended(gateway, id)
        with sqlite3.connect(tmp_path / "jobs.sqlite") as database:
            database.execute("UPDATE workflow_status SET completed_at = completed_at - 86400000")
        old, young = time.time() - 3600, time.time() + 3600
        return [await gateway.store.ended(before, 2) for before in (old, young, None)], ids

    (old, young, every), ids = scenario(tmp_path, act)
    assert old == []
    assert young == every == ids[:2]


def test_a_job_that_was_cancelled_is_not_taken_up_again(tmp_path):
    """A look at what lost its run may be older than the cancellation."""

    async def act(gateway, engine):
        id = await created(gateway, engine)
        await gateway.store.cancel(id)
        await gateway.store.resume([id])
        return (await gateway.store.get(id)).outcome["code"]

    assert scenario(tmp_path, act) == "cancelled"


class StalledOnce(Runner):
    """Its first run is claimed and not running yet, for a while."""

    stalled = False

    async def make(self, job):
        if not self.stalled:
            self.stalled = True
            await asyncio.sleep(1.2)
        return await super().make(job)


def test_a_run_that_was_taken_for_lost_does_not_fail_its_job(tmp_path):
    """A busy server may see a job claimed and not running, and start it again while it begins: one end, one set of files."""
    hasty = Intervals(watchdog=0.1, lost_after=0.4)

    async def act(gateway, engine):
        resumed, resume = [], gateway.store.resume

        async def noted(ids):
            resumed.extend(ids)
            await resume(ids)

        gateway.store.resume = noted
        id = await created(gateway, engine)
        await until(lambda: resumed)
        await asyncio.sleep(1.5)  # both runs are there
        engine.end(id)
        outcome = await ended(gateway, id)
        return outcome["status"], engine.begun == [id], left(gateway) == sorted(result_files.names(id))

    assert scenario(tmp_path, act, runner=StalledOnce, intervals=hasty) == ("completed", True, True)


class Unstartable(ScriptedEngine):
    """An engine that fails before it is ready."""

    async def start(self):
        raise self.error


class Breaking(ScriptedEngine):
    """An engine that fails later."""

    async def run(self):
        raise self.error


@pytest.mark.parametrize("kind", [Unstartable, Breaking])
@pytest.mark.parametrize(
    "error", [DeviceError("there is no such device"), PermissionError(13, "no")], ids=lambda e: type(e).__name__
)
def test_an_engine_that_fails_ends_the_server_with_a_reason(tmp_path, monkeypatch, caplog, kind, error):
    """Else it would answer 503 for ever, or be ready and make nothing."""
    kind.error = error

    async def act(gateway, engine):
        ended = asyncio.Event()
        gateway.on_failure = ended.set
        await ended.wait()
        return gateway.failure

    failure = scenario(tmp_path, act, kind)
    assert isinstance(failure, VstarError)
    assert str(error) in str(failure)
    assert type(error) is DeviceError or "PermissionError" in caplog.text


def test_a_database_that_may_only_be_read_for_a_while_stops_nobody_from_looking_after_jobs(tmp_path):
    """As Postgres after its standby took over, until connections are made anew."""

    async def act(gateway, engine):
        claimed, failures, looked = gateway.store.claimed, [1, 2], asyncio.Event()

        async def read_only():
            if failures:
                raise InternalError("UPDATE", {}, Exception("cannot execute UPDATE in a read-only transaction"), failures.pop())
            looked.set()
            return await claimed()

        gateway.store.claimed = read_only
        await looked.wait()
        return gateway.failure

    assert scenario(tmp_path, act, intervals=Intervals(watchdog=0.05)) is None


@pytest.mark.parametrize("where", ["add", "get"])
def test_a_database_that_may_only_be_read_is_said_so(tmp_path, where):
    """503, which clients try again; not 500."""
    error = InternalError("UPDATE", {}, Exception("cannot execute UPDATE in a read-only transaction"))

    async def refuse(*_, **__):
        raise error

    async def act(gateway, engine):
        setattr(gateway.store, where, refuse)
        async with connected(gateway) as http:
            unknown = f"/v1/videos/{new_id()}"
            answer = await (http.get(unknown) if where == "get" else http.post("/v1/videos", json={"prompt": "a tree"}))
        return answer.status_code, answer.json()["error"]["code"]

    assert scenario(tmp_path, act) == (503, "store_unavailable")


@pytest.mark.parametrize("first", [False, True], ids=["its own job", "another request's job"])
def test_a_video_that_takes_too_long_to_wait_for_is_said_so_for_good(tmp_path, first):
    """A client that tried again would only make the server do it twice; the job goes if it was made for this request."""

    async def act(gateway, engine):
        body, key = {"prompt": "a tree", "size": "64x32", "num_frames": 8}, {"idempotency-key": "k"}
        async with connected(gateway) as http:
            if first:
                await http.post("/v1/videos", json=body, headers=key)
            answer = await http.post("/v1/videos/sync", json=body, headers=key)
            (video,) = (await http.get("/v1/videos")).json()["data"]
        return answer.status_code, answer.headers.get("x-should-retry"), video["error"] and video["error"]["code"]

    assert scenario(tmp_path, act, sync_timeout=0.3) == (504, "false", None if first else "cancelled")


def test_requests_for_a_video_alone_are_counted_as_refused(tmp_path):
    """A question that has no answer is no refusal, and neither is a video that was accepted and failed."""

    def refused(gateway):
        found = (sample for family in gateway.metrics.registry.collect() for sample in family.samples)
        return {s.labels["code"]: s.value for s in found if s.name == "vstar_jobs_refused_total"}

    async def act(gateway, engine):
        unknown = f"/v1/videos/{new_id()}"
        async with connected(gateway) as http:
            for path in (unknown, f"{unknown}/content", "/v1/videos?limit=0", "/nothing", "/v1/models/none"):
                assert (await http.get(path)).status_code in (400, 404)
            assert (await http.post(f"{unknown}/cancel")).status_code == 404
            assert (await http.post("/v1/videos/sync", json={"prompt": "a tree", "size": "64x32"})).status_code == 504
            assert not refused(gateway)
            assert (await http.post(f"{unknown}/remix", json={"prompt": "a bush"})).status_code == 404
            assert (await http.post("/v1/videos/sync", json={"prompt": "a tree", "size": "1x1"})).status_code == 400
            assert (await http.post("/v1/videos", content=b" " * 2**21)).status_code == 413
        return refused(gateway)

    wanted = {"video_not_found": 1, "invalid_value": 1, "body_too_large": 1}
    assert scenario(tmp_path, act, sync_timeout=0.3) == wanted


def test_a_job_that_another_server_took_up_is_in_progress(tmp_path):
    """The server that accepted the job tracks it as queued and sees no step of it."""

    async def act(gateway, engine):
        stored = await gateway.store.get(await created(gateway, engine))
        assert stored.taken_by == gateway.settings.instance
        gateway.runner.tracker[stored.job.id].requeue()
        taken = [
            stored,
            replace(stored, taken_by="another"),
            replace(stored, taken_by="another", outcome=failed("cancelled", "")),
        ]
        return [gateway.show(each).status for each in taken]

    assert scenario(tmp_path, act) == ["queued", "in_progress", "failed"]


# no poll of the queue but when it is woken
PATIENT = Intervals(idle_poll=3600.0, shared_idle_poll=3600.0, recovered_idle_poll=3600.0)


def test_jobs_that_wait_are_taken_without_an_idle_poll(tmp_path):
    """Two are with the engine at most; the others go through the queue."""

    async def act(gateway, engine):
        bodies = [CreateVideo(prompt=f"tree {n}", num_frames=8, size="64x32", num_inference_steps=2) for n in range(6)]
        stored_jobs = await asyncio.gather(*(gateway.create(Caller(OWNER), body) for body in bodies))
        for number in range(len(stored_jobs)):
            await until(lambda number=number: len(engine.begun) > number)
            id = engine.begun[number]
            await until(lambda id=id: id in engine.ends)
            engine.end(id)
            assert (await ended(gateway, id))["status"] == "completed"
        return [stored.job.id for stored in stored_jobs], engine.begun

    accepted, begun = scenario(tmp_path, act, max_batch=1, intervals=PATIENT)
    assert sorted(begun) == sorted(accepted)


def test_a_job_that_ran_when_the_server_ended_is_resumed_without_an_idle_poll(tmp_path):
    left = scenario(tmp_path, created)

    async def act(gateway, engine):
        await until(lambda: left in engine.ends)
        engine.end(left)
        return await ended(gateway, left)

    assert scenario(tmp_path, act, intervals=PATIENT)["status"] == "completed"


def test_an_idle_server_hardly_polls(tmp_path, monkeypatch):
    polls, poll = [], SystemDatabase.start_queued_workflows

    def counted(self, queue, *args, **values):
        polls.append(queue.name)
        return poll(self, queue, *args, **values)

    monkeypatch.setattr(SystemDatabase, "start_queued_workflows", counted)

    async def act(gateway, engine):
        await asyncio.sleep(0.5)  # the first polls
        polls.clear()
        await asyncio.sleep(2.0)

    scenario(tmp_path, act)
    # of one poll in 50 ms there would be forty
    assert len(polls) <= 4
