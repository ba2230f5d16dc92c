"""The engine in a child process: batches, cancellation, faults, and nothing left behind."""

import asyncio
import os
import signal
import time
from contextlib import asynccontextmanager

import pytest
import slow_engine
from slow_engine import BUCKET, job, of, told, until

from vstar_engine.artifacts import sha256
from vstar_engine.serving import events, results
from vstar_engine.serving.lanes import Rules, WorkerError
from vstar_engine.serving.process import ProcessEngine
from vstar_engine.serving.settings import Settings

# no test may take longer, in seconds: a job that is lost would wait for ever
LIMIT = 60.0
# a worker is back after 0.7 s; other work may share the machine
READY = 30.0
LONG = {"frames": 16, "steps": 40}


@asynccontextmanager
async def running(folder, **settings):
    """An engine that has started; time is up after LIMIT."""
    async with asyncio.timeout(LIMIT):
        engine = slow_engine.client(folder, **settings)
        await engine.start()
        try:
            yield engine
        finally:
            await engine.close(0)


def rules(**changed):
    return Rules(**{"buckets": (BUCKET,), "hang_after": 2.0, **changed})


def test_a_video_is_told_of_stage_by_stage_and_lies_whole_in_its_folder(tmp_path):
    one = job("a tree", seed=7, steps=4)

    async def scenario():
        async with running(tmp_path) as engine:
            assert engine.ready
            return await told(engine, one), engine.facts()

    found, facts = asyncio.run(scenario())
    assert found[0] == events.Started(1)
    assert [event.name for event in of(events.Stage, found)] == list(events.STAGES)
    assert [(event.done, event.total) for event in of(events.Step, found)] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    done = found[-1]
    assert (done.file, done.frames, done.width, done.height) == (f"{one.id}.mp4", 8, 64, 32)
    assert (tmp_path / done.file).stat().st_size == done.bytes
    assert sha256(tmp_path / done.file) == done.sha256
    assert list(done.seconds) == ["text", "denoise", "decode", "encode"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f"{one.id}{end}" for end in (".jpg", ".mp4", ".sheet.jpg")]
    )
    assert {*events.FACTS} <= facts.keys()


def test_a_step_says_how_long_it_will_take_and_twice_a_second_what_it_looks_like(tmp_path):
    async def scenario():
        async with running(tmp_path, step=0.05) as engine:
            return of(events.Step, await told(engine, job(steps=25)))

    steps = asyncio.run(scenario())
    pictures = [step.preview for step in steps if step.preview]
    assert 1 <= len(pictures) <= 4
    assert all(picture.startswith("data:image/jpeg;base64,") for picture in pictures)
    assert 0.5 < steps[4].seconds_left < 4.0
    assert steps[-1].seconds_left == 0.0


def test_jobs_of_one_shape_ride_together_where_that_pays(tmp_path):
    jobs = [job(f"tree {i}", seed=i) for i in range(6)] + [job(frames=9)]

    async def scenario():
        async with running(tmp_path) as engine:
            found = await asyncio.gather(*(told(engine, one) for one in jobs))
            return [of(events.Started, events_)[0].batch for events_ in found], engine.facts()["batch_limits"]

    sizes, limits = asyncio.run(scenario())
    assert limits == {"8x32x64": 4}
    assert sorted(sizes) == [1, 2, 2, 4, 4, 4, 4]
    assert sizes[-1] == 1


def test_where_a_batch_does_not_pay_every_job_rides_alone(tmp_path):
    async def scenario():
        async with running(tmp_path, wider=0.95) as engine:
            found = await asyncio.gather(*(told(engine, job()) for _ in range(3)))
            return [of(events.Started, each)[0].batch for each in found], engine.facts()["batch_limits"]

    assert asyncio.run(scenario()) == ([1, 1, 1], {"8x32x64": 1})


@pytest.mark.parametrize(("delay", "batch"), [(0.5, 2), (0.0, 1)])
def test_an_idle_worker_waits_a_moment_for_company(tmp_path, delay, batch):
    async def scenario():
        async with running(tmp_path, rules=rules(batch_delay=delay, short=0.0)) as engine:
            first = asyncio.create_task(told(engine, job()))
            await asyncio.sleep(0.05)
            second = await told(engine, job())
            return of(events.Started, await first)[0].batch, of(events.Started, second)[0].batch

    assert asyncio.run(scenario()) == (batch, batch)


def test_higher_priority_goes_first(tmp_path):
    order = []

    async def note(engine, one):
        found = await told(engine, one)
        order.append(one.priority)
        return found

    async def scenario():
        async with running(tmp_path, rules=rules(short=0.0)) as engine:
            jobs = [job(frames=10 + priority, priority=priority) for priority in (0, 2, -1, 1)]
            await asyncio.gather(*(note(engine, one) for one in jobs))

    asyncio.run(scenario())
    assert order == [2, 1, 0, -1]


def test_short_jobs_go_between_the_steps_of_a_long_one(tmp_path):
    long, ended = job("long", **LONG), []

    async def note(engine, one):
        found = await told(engine, one)
        ended.append(one.prompt)
        return found

    async def scenario():
        async with running(tmp_path, step=0.05) as engine:
            first, heard = asyncio.create_task(note(engine, long)), []
            await asyncio.sleep(0.3)
            await asyncio.gather(*(note(engine, job(f"short {i}", steps=2)) for i in range(3)))
            heard = of(events.Step, await first)
            return heard, engine.facts()["counters"]["between"]

    steps, between = asyncio.run(scenario())
    assert ended[-1] == "long"
    assert between == 3
    assert [step.done for step in steps] == list(range(1, 41))


def test_short_jobs_take_a_bounded_share_of_the_long_one(tmp_path):
    """However many come, the long job lasts half as long again at most."""
    ended = []

    async def note(engine, one):
        await told(engine, one)
        ended.append(one.prompt)

    async def scenario():
        async with running(tmp_path, step=0.02) as engine:
            long = asyncio.create_task(note(engine, job("long", **LONG)))
            await asyncio.sleep(0.1)
            await asyncio.gather(long, *(note(engine, job("short", steps=3, frames=9 + i)) for i in range(40)))

    asyncio.run(scenario())
    assert 0 < ended.index("long") < 35


@pytest.mark.parametrize("when", ["waiting", "running", "in company"])
def test_a_job_is_cancelled_within_a_step(tmp_path, when):
    step = 0.15
    other, one = job("other", steps=6, frames=8 if when == "in company" else 9), job("one", steps=6)

    async def scenario():
        async with running(tmp_path, step=step, rules=rules(short=0.0)) as engine:
            jobs = [one] if when == "running" else [other, one]
            heard = {each.id: [] for each in jobs}
            tasks = [asyncio.create_task(told(engine, each, heard[each.id])) for each in jobs]
            first = jobs[0] if when == "waiting" else one
            await until(lambda: of(events.Step, [event for _, event in heard[first.id]]))
            asked = time.monotonic()
            await engine.cancel(one.id)
            await until(lambda: heard[one.id] and isinstance(heard[one.id][-1][1], events.Failed))
            took = time.monotonic() - asked
            await asyncio.gather(*tasks)
            return took, heard[one.id][-1][1], heard[jobs[0].id][-1][1]

    took, ended, first = asyncio.run(scenario())
    assert ended.code == events.CANCELLED
    assert took < (0.1 if when == "waiting" else step * 1.2 + 0.5)
    assert when == "running" or isinstance(first, events.Done)
    assert not (tmp_path / f"{one.id}.mp4").exists()


def test_jobs_are_cancelled_while_they_are_decoded(tmp_path):
    """One batch of three whose first video is being decoded, for seconds: the next job does not wait for any of them."""
    jobs, after = [job("finish=4", seed=seed, steps=2) for seed in range(3)], job("after", frames=9)

    async def scenario():
        async with running(tmp_path, rules=rules(short=0.0)) as engine:
            heard = {each.id: [] for each in (*jobs, after)}
            tasks = [asyncio.create_task(told(engine, each, heard[each.id])) for each in (*jobs, after)]

            def events_of(id):
                return [event for _, event in heard[id]]

            await until(lambda: any(events.Stage("decode") in events_of(each.id) for each in jobs))
            asked = time.monotonic()
            for each in jobs:
                await engine.cancel(each.id)
            await until(lambda: of(events.Started, events_of(after.id)))
            took = time.monotonic() - asked
            await asyncio.gather(*tasks)
            return took, [events_of(each.id)[-1] for each in jobs], events_of(after.id)[-1]

    took, ended, last = asyncio.run(scenario())
    assert took < 4 / slow_engine.PARTS + 0.5
    assert [event.code for event in ended] == [events.CANCELLED] * 3
    assert isinstance(last, events.Done)
    assert {path.name.partition(".")[0] for path in tmp_path.iterdir()} == {after.id}


def test_one_job_of_several_is_cancelled_while_another_is_decoded(tmp_path):
    jobs = [job("finish=1", seed=seed, steps=2) for seed in range(3)]

    async def scenario():
        async with running(tmp_path, rules=rules(short=0.0)) as engine:
            heard = [[] for _ in jobs]
            tasks = [asyncio.create_task(told(engine, *each)) for each in zip(jobs, heard, strict=True)]
            await until(lambda: events.Stage("decode") in [event for _, event in heard[0]])
            await engine.cancel(jobs[2].id)
            return [found[-1].kind for found in await asyncio.gather(*tasks)]

    assert asyncio.run(scenario()) == ["done", "done", "failed"]


def test_cancelling_an_unknown_job_is_no_error(tmp_path):
    async def scenario():
        async with running(tmp_path) as engine:
            await engine.cancel("video_of_nobody")

    asyncio.run(scenario())


def test_a_stream_that_is_closed_cancels_its_job_and_may_be_opened_again(tmp_path):
    one = job(steps=50)

    async def scenario():
        async with running(tmp_path, step=0.05) as engine:
            stream = engine.submit(one)
            await anext(stream)
            await stream.aclose()
            again = job("again", steps=2, id=one.id)
            return await told(engine, again)

    found = asyncio.run(scenario())
    assert isinstance(found[-1], events.Done)
    assert [step.total for step in of(events.Step, found)] == [2, 2]


def test_a_job_that_is_on_its_way_is_not_taken_twice(tmp_path):
    one = job(steps=20)

    async def scenario():
        async with running(tmp_path) as engine:
            stream = engine.submit(one)
            await anext(stream)
            with pytest.raises(ValueError, match="on its way already"):
                await anext(engine.submit(one))
            await stream.aclose()

    asyncio.run(scenario())


def test_a_killed_worker_costs_one_more_try_of_its_job_and_nothing_else(tmp_path):
    first, second = job("first", steps=30), job("second", frames=9)

    async def scenario():
        async with running(tmp_path, step=0.05, rules=rules(short=0.0)) as engine:
            heard = []
            tasks = [asyncio.create_task(told(engine, first, heard)), asyncio.create_task(told(engine, second))]
            await until(lambda: len(of(events.Step, [event for _, event in heard])) > 3)
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


@pytest.mark.parametrize(
    ("fault", "code"), [("crash@1", "worker_crashed"), ("segv@2", "worker_crashed"), ("stop@1", "worker_hung")]
)
def test_a_poisonous_job_fails_after_three_tries_and_the_next_one_runs(tmp_path, fault, code):
    async def scenario():
        async with running(tmp_path, rules=rules(hang_after=0.5)) as engine:
            return await asyncio.gather(*(told(engine, job(prompt)) for prompt in (fault, "a tree", "a bush")))

    poison, *others = asyncio.run(scenario())
    assert len(of(events.Started, poison)) == 3
    assert poison[-1].code == code
    assert "3 times" in poison[-1].message
    assert all(isinstance(found[-1], events.Done) for found in others)


def test_a_worker_that_hangs_in_a_step_is_ended(tmp_path):
    async def scenario():
        async with running(tmp_path, rules=rules(hang_after=0.5)) as engine:
            one = asyncio.create_task(told(engine, job(steps=30, frames=9)))
            await asyncio.sleep(0.2)
            os.kill(engine.pid, signal.SIGSTOP)
            return await one

    found = asyncio.run(scenario())
    assert len(of(events.Started, found)) == 2
    assert isinstance(found[-1], events.Done)


def test_slow_steps_are_no_hang(tmp_path):
    """Three times what such a step should take is waited for, though that is more than `hang_after`."""

    async def scenario():
        async with running(tmp_path, step=0.4, rules=rules(hang_after=0.3, max_batch=1)) as engine:
            return await told(engine, job(steps=3)), engine.facts()["counters"]["restarts"]

    found, restarts = asyncio.run(scenario())
    assert isinstance(found[-1], events.Done)
    assert restarts == 0


def test_what_does_not_fit_in_company_is_made_alone(tmp_path):
    async def scenario():
        async with running(tmp_path) as engine:
            return await asyncio.gather(*(told(engine, job(prompt)) for prompt in ("memory-batch@2", "a tree"))), engine.pid

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
            found = await asyncio.gather(*(told(engine, job(prompt)) for prompt in ("a tree", fault, "a bush")))
            return found, engine.pid == before

    (tree, failed, bush), same = asyncio.run(scenario())
    assert same
    assert failed[-1].code == code
    assert [event.batch for event in of(events.Started, failed)] == [3, 1]
    assert all(isinstance(found[-1], events.Done) for found in (tree, bush))


@pytest.mark.parametrize("sync", range(6, 12))
def test_a_full_disk_leaves_nothing_half_written_and_may_be_tried_again(tmp_path, sync):
    one = job()

    async def scenario():
        async with running(tmp_path, full=[sync]) as engine:
            failed = await told(engine, one)
            left = [path.name for path in tmp_path.iterdir()]
            return failed[-1], left, await told(engine, one)

    failed, left, after = asyncio.run(scenario())
    assert (failed.code, failed.retry) == (events.STORAGE_FULL, True)
    assert not left
    assert isinstance(after[-1], events.Done)


def test_what_a_dead_worker_left_half_written_is_swept_and_what_another_server_writes_is_not(tmp_path):
    own, another = (results.owner_of(name) for name in (Settings.instance, "another"))
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


def test_closing_gives_waiting_jobs_back_and_lets_running_ones_end(tmp_path):
    async def scenario():
        async with running(tmp_path, step=0.05, rules=rules(short=0.0)) as engine:
            tasks = [asyncio.create_task(told(engine, one)) for one in (job(steps=10), job(frames=9))]
            await asyncio.sleep(0.2)
            await engine.close(10.0)
            late = await told(engine, job())
            return await asyncio.gather(*tasks), late, engine.ready

    (ran, waited), late, ready = asyncio.run(scenario())
    assert isinstance(ran[-1], events.Done)
    assert (waited[-1].code, waited[-1].retry) == ("cancelled", True)
    assert late[-1].retry
    assert not ready


def test_closing_without_grace_gives_running_jobs_back_too(tmp_path):
    async def scenario():
        async with running(tmp_path, step=0.2) as engine:
            task = asyncio.create_task(told(engine, job(steps=100)))
            await asyncio.sleep(0.3)
            start = time.monotonic()
            await engine.close(0.1)
            return await task, time.monotonic() - start

    found, took = asyncio.run(scenario())
    assert found[-1].retry
    assert took < 2.0


@pytest.mark.parametrize(
    ("factory", "settings", "complaint"),
    [
        ("slow_engine:absent", {"step": 0.1}, "ended before it was ready"),
        ("vstar_engine.serving.model:load", {"engine": {"model": "maxi"}}, "unknown model 'maxi'"),
    ],
)
def test_an_engine_that_cannot_start_says_so(tmp_path, factory, settings, complaint):
    async def scenario():
        engine = ProcessEngine(tmp_path, settings, rules(), factory, slow_engine.environment())
        with pytest.raises(WorkerError, match=complaint):
            await engine.start()
        assert not engine.ready

    asyncio.run(scenario())
