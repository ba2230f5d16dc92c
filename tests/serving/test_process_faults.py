"""The engine in a child process: workers that die, hang or find no room, and nothing left behind."""

import asyncio
import os
import signal
import time

import pytest

from support import slow_engine
from support.slow_engine import events_of, job, of, policy, running, until
from vstar_engine.serving.jobs import events, result_files
from vstar_engine.serving.settings import Settings
from vstar_engine.serving.workers.dispatch_state import WorkerError
from vstar_engine.serving.workers.local_process import ProcessEngine

# a worker is back after 0.7 s; other work may share the machine
READY = 30.0


def test_a_killed_worker_costs_one_more_try_of_its_job_and_nothing_else(tmp_path):
    first, second = job("first", steps=30), job("second", frames=9)

    async def scenario():
        async with running(tmp_path, step=0.05, policy=policy(short_job_share=0.0)) as engine:
            received = []
            tasks = [asyncio.create_task(events_of(engine, first, received)), asyncio.create_task(events_of(engine, second))]
            await until(lambda: len(of(events.Step, [event for _, event in received])) > 3)
            os.kill(engine.pid, signal.SIGKILL)
            await until(lambda: not engine.ready)
            gone = time.monotonic()
            await until(lambda: engine.ready)
            return time.monotonic() - gone, await asyncio.gather(*tasks), engine.facts()["counters"]

    back, (one, other), counters = asyncio.run(scenario())
    assert back < READY
    assert len(of(events.Started, one)) == 2
    assert len(of(events.Started, other)) == 1
    assert all(isinstance(found[-1], events.Done) for found in (one, other))
    assert (counters["restarts"], counters["retried"]) == (1, 1)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("fault", "code"), [("crash@1", "worker_crashed"), ("segv@2", "worker_crashed"), ("stop@1", "worker_hung")]
)
def test_a_poisonous_job_fails_after_three_tries_and_the_next_one_runs(tmp_path, fault, code):
    async def scenario():
        async with running(tmp_path, policy=policy(hang_after=0.5)) as engine:
            return await asyncio.gather(*(events_of(engine, job(prompt)) for prompt in (fault, "a tree", "a bush")))

    poison, *others = asyncio.run(scenario())
    assert len(of(events.Started, poison)) == 3
    assert poison[-1].code == code
    assert "3 times" in poison[-1].message
    assert all(isinstance(found[-1], events.Done) for found in others)


@pytest.mark.reliability
def test_a_worker_that_hangs_in_a_step_is_ended(tmp_path):
    async def scenario():
        async with running(tmp_path, policy=policy(hang_after=0.5)) as engine:
            one = asyncio.create_task(events_of(engine, job(steps=30, frames=9)))
            await asyncio.sleep(0.2)
            os.kill(engine.pid, signal.SIGSTOP)
            return await one

    found = asyncio.run(scenario())
    assert len(of(events.Started, found)) == 2
    assert isinstance(found[-1], events.Done)


@pytest.mark.reliability
def test_slow_steps_are_no_hang(tmp_path):
    """Three times what such a step should take is waited for, though that is more than `hang_after`."""

    async def scenario():
        async with running(tmp_path, step=0.4, policy=policy(hang_after=0.3, max_batch=1)) as engine:
            return await events_of(engine, job(steps=3)), engine.facts()["counters"]["restarts"]

    found, restarts = asyncio.run(scenario())
    assert isinstance(found[-1], events.Done)
    assert restarts == 0


def test_what_does_not_fit_in_company_is_made_alone(tmp_path):
    async def scenario():
        async with running(tmp_path) as engine:
            return await asyncio.gather(
                *(events_of(engine, job(prompt)) for prompt in ("memory-batch@2", "a tree"))
            ), engine.pid

    both, _ = asyncio.run(scenario())
    assert [[event.batch for event in of(events.Started, found)] for found in both] == [[2, 1], [2, 1]]
    assert all(isinstance(found[-1], events.Done) for found in both)


@pytest.mark.parametrize(
    ("fault", "code"), [("memory@2", "out_of_memory"), ("error@1", "generation_failed"), ("invalid", "invalid_request")]
)
def test_what_fails_alone_fails_that_job_only_and_costs_no_worker(tmp_path, fault, code):
    async def scenario():
        async with running(tmp_path) as engine:
            before = engine.pid
            found = await asyncio.gather(*(events_of(engine, job(prompt)) for prompt in ("a tree", fault, "a bush")))
            return found, engine.pid == before

    (tree, failed, bush), same = asyncio.run(scenario())
    assert same
    assert failed[-1].code == code
    assert [event.batch for event in of(events.Started, failed)] == [3, 1]
    assert all(isinstance(found[-1], events.Done) for found in (tree, bush))


@pytest.mark.parametrize("sync", [6, *(pytest.param(sync, marks=pytest.mark.reliability) for sync in range(7, 12))])
def test_a_full_disk_leaves_nothing_half_written_and_may_be_tried_again(tmp_path, sync):
    one = job()

    async def scenario():
        async with running(tmp_path, full=[sync]) as engine:
            failed = await events_of(engine, one)
            left = [path.name for path in tmp_path.iterdir()]
            return failed[-1], left, await events_of(engine, one)

    failed, left, after = asyncio.run(scenario())
    assert (failed.code, failed.retry) == (events.STORAGE_FULL, True)
    assert not left
    assert isinstance(after[-1], events.Done)


def test_what_a_dead_worker_left_half_written_is_swept_and_what_another_server_writes_is_not(tmp_path):
    own, another = (result_files.owner_of(name) for name in (Settings.instance, "another"))
    names = {"a": own, "b": another, "c": another}
    halves = {name: tmp_path / f".video_{name}.mp4.{who}.partial.mp4" for name, who in names.items()}
    halves["d"] = tmp_path / f".{halves['a'].name}.77.partial.mp4"  # by who writes aside of what is aside
    for path in halves.values():
        path.write_bytes(b"half")
    os.utime(halves["c"], (0, 0))

    async def scenario():
        async with running(tmp_path):
            pass

    asyncio.run(scenario())
    assert list(tmp_path.iterdir()) == [halves["b"]]


@pytest.mark.parametrize(
    ("factory", "settings", "complaint"),
    [
        ("support.slow_engine:absent", {"step": 0.1}, "ended before it was ready"),
        ("vstar_engine.serving.workers.engine_renderer:load", {"engine": {"model": "maxi"}}, "unknown model 'maxi'"),
    ],
)
def test_an_engine_that_cannot_start_says_so(tmp_path, factory, settings, complaint):
    async def scenario():
        engine = ProcessEngine(tmp_path, settings, policy(), factory, slow_engine.environment())
        with pytest.raises(WorkerError, match=complaint):
            await engine.start()
        assert not engine.ready

    asyncio.run(scenario())
