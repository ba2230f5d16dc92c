"""F16: jobs of a server of another version wait for one of that version, and stop nobody meanwhile."""

import asyncio
import json
import sqlite3
import time

import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from support.gateway import OWNER, created, ended, scenario
from support.servers import Server
from support.slow_engine import until
from vstar_engine.serving.errors import ApiError
from vstar_engine.serving.http.schema import CreateVideo, RemixVideo
from vstar_engine.serving.http.service import Caller
from vstar_engine.serving.settings import Intervals

REMIX = RemixVideo(prompt="a bush")
HASTY = Intervals(watchdog=0.1, lost_after=0.4)


def become_foreign(folder):
    """Makes every job one of another version, which has no `steps`, other `states`, and a field more."""
    with sqlite3.connect(folder / "jobs.sqlite") as database:
        database.execute("UPDATE workflow_status SET application_version = 'jobs-0'")
        for id, text in database.execute("SELECT workflow_uuid, inputs FROM workflow_input").fetchall():
            written = json.loads(text)
            (content,) = written["positionalArgs"]
            del content["steps"]
            content |= {"states": {"first": "a tree"}, "pace": 1.5}
            database.execute("UPDATE workflow_input SET inputs = ? WHERE workflow_uuid = ?", (json.dumps(written), id))


def test_jobs_of_another_version_are_shown_and_left_alone(tmp_path, caplog):
    async def before(gateway, engine):
        done, waiting = [await created(gateway, engine) for _ in range(2)]
        engine.end(done)
        await ended(gateway, done)
        return done, waiting

    async def after(gateway, engine):
        own = await created(gateway, engine)
        assert len(gateway.admission) == 1
        assert list(await gateway.store.unfinished()) == [own]
        stored_jobs, more = await gateway.store.page(OWNER, None, 10, False)
        shown = [gateway.show(await gateway.get(OWNER, id)) for id in (done, waiting)]
        with pytest.raises(ApiError, match="accepted by another version"):
            await gateway.remix(Caller(OWNER), done, REMIX)
        with pytest.raises(ApiError, match="there is no video"):
            await gateway.get("another", done)
        cancelled = await gateway.cancel(OWNER, waiting)
        await gateway.delete(OWNER, waiting)
        return {stored.job.id for stored in stored_jobs} - {own}, more, shown, cancelled.outcome["code"], engine.begun == [own]

    done, waiting = scenario(tmp_path, before)
    become_foreign(tmp_path)
    listed, more, shown, cancelled, alone = scenario(tmp_path, after)
    assert (listed, more, cancelled, alone) == ({done, waiting}, False, "cancelled", True)
    assert [video.status for video in shown] == ["completed", "queued"]
    assert {(video.prompt, video.size, tuple(video.synopsis)) for video in shown} == {("a tree", "64x32", ())}
    assert "1 jobs wait for a server of the version and model that accepted them (jobs-0)" in caplog.text


def test_jobs_of_another_model_wait_for_it(tmp_path, caplog):
    """A server that was started again with another model must not make them: they would be recorded as what they are not."""

    async def before(gateway, engine):
        return await created(gateway, engine)

    async def meanwhile(gateway, engine):
        own = await created(gateway, engine)
        body = CreateVideo(prompt="a bush", num_frames=8, size="64x32", num_inference_steps=2)
        other = (await gateway.create(Caller(OWNER, "another model's"), body)).job.id
        remix = await gateway.remix(Caller(OWNER), waiting, REMIX)
        await asyncio.sleep(HASTY.lost_after + 5 * HASTY.watchdog)
        shown = gateway.show(await gateway.get(OWNER, waiting))
        assert (shown.model, shown.status, remix.job.model) == ("mini", "queued", "maxi")
        assert waiting not in engine.begun
        assert waiting not in await gateway.store.unfinished()
        assert (await gateway.cancel(OWNER, other)).outcome["code"] == "cancelled"
        return own

    async def after(gateway, engine):
        await until(lambda: waiting in engine.ends)
        engine.end(waiting)
        return (await ended(gateway, waiting))["status"], engine.begun

    waiting = scenario(tmp_path, before)
    scenario(tmp_path, meanwhile, model="maxi", intervals=HASTY)
    assert "1 jobs wait for a server of the version and model that accepted them (jobs-1/mini)" in caplog.text
    assert scenario(tmp_path, after) == ("completed", [waiting])


@pytest.mark.reliability
def test_a_server_of_this_version_takes_over_and_gives_back(tmp_path):
    """Killed with jobs queued and running, the server is replaced by ours, and ours by one like it."""
    other = ("--renderer", "support.other_version:load")
    theirs, ours = Server(tmp_path, *other, slow={"step": 0.2}, module="support.other_version"), Server(tmp_path)
    with theirs:
        ids = [theirs.create(f"job {number}", num_frames=8 + number, num_inference_steps=20) for number in range(6)]
        theirs.wait(ids[0], "in_progress")
        theirs.kill()
    with ours:
        assert "6 jobs wait for a server of the version and model that accepted them (jobs-2/mini)" in ours.log()
        done = [ours.create() for _ in range(3)]
        assert {ours.wait(id)["status"] for id in done} == {"completed"}
        assert {video["id"] for video in ours.every()} == {*ids, *done}
        time.sleep(Intervals.lost_after + 3 * Intervals.watchdog)
        assert {ours.get(id)["status"] for id in ids} == {"queued"}
        assert ours.http.post(f"/v1/videos/{ids[5]}/cancel").json()["error"]["code"] == "cancelled"
        assert ours.http.post(f"/v1/videos/{ids[4]}/remix", json={"prompt": "a bush"}).status_code == 409
        assert "had lost their run" not in ours.log()
        assert ours.stop() == 0
    with Server(tmp_path, *other, module="support.other_version") as theirs:
        videos = theirs.ledger([*ids, *done])
    assert {video["id"]: video["status"] for video in videos} == {
        **dict.fromkeys([*ids, *done], "completed"),
        ids[5]: "failed",
    }
