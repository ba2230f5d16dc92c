"""The engine in a child process: what it tells, batches, turns, cancellation, and its end."""

import asyncio
import time

import pytest

from support import slow_engine
from support.slow_engine import events_of, job, of, policy, running, until
from vstar_engine.artifacts.files import sha256
from vstar_engine.serving.jobs import events

LONG = {"frames": 16, "steps": 40}


def test_a_video_is_told_of_stage_by_stage_and_lies_whole_in_its_folder(tmp_path):
    one = job("a tree", seed=7, steps=4)

    async def scenario():
        async with running(tmp_path) as engine:
            assert engine.ready
            return await events_of(engine, one), engine.facts()

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
            return of(events.Step, await events_of(engine, job(steps=25)))

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
            found = await asyncio.gather(*(events_of(engine, one) for one in jobs))
            return [of(events.Started, events_)[0].batch for events_ in found], engine.facts()["batch_limits"]

    sizes, limits = asyncio.run(scenario())
    assert limits == {"8x32x64": 4}
    assert sorted(sizes) == [1, 2, 2, 4, 4, 4, 4]
    assert sizes[-1] == 1


def test_where_a_batch_does_not_pay_every_job_rides_alone(tmp_path):
    async def scenario():
        async with running(tmp_path, wider=0.95) as engine:
            found = await asyncio.gather(*(events_of(engine, job()) for _ in range(3)))
            return [of(events.Started, each)[0].batch for each in found], engine.facts()["batch_limits"]

    assert asyncio.run(scenario()) == ([1, 1, 1], {"8x32x64": 1})


@pytest.mark.parametrize(("delay", "batch"), [(0.5, 2), (0.0, 1)])
def test_an_idle_worker_waits_a_moment_for_company(tmp_path, delay, batch):
    async def scenario():
        async with running(tmp_path, policy=policy(batch_delay=delay, short_job_share=0.0)) as engine:
            first = asyncio.create_task(events_of(engine, job()))
            await asyncio.sleep(0.05)
            second = await events_of(engine, job())
            return of(events.Started, await first)[0].batch, of(events.Started, second)[0].batch

    assert asyncio.run(scenario()) == (batch, batch)


def test_higher_priority_goes_first(tmp_path):
    order = []

    async def note(engine, one):
        found = await events_of(engine, one)
        order.append(one.priority)
        return found

    async def scenario():
        async with running(tmp_path, policy=policy(short_job_share=0.0)) as engine:
            jobs = [job(frames=10 + priority, priority=priority) for priority in (0, 2, -1, 1)]
            await asyncio.gather(*(note(engine, one) for one in jobs))

    asyncio.run(scenario())
    assert order == [2, 1, 0, -1]


def test_short_jobs_go_between_the_steps_of_a_long_one(tmp_path):
    long, ended = job("long", **LONG), []

    async def note(engine, one):
        found = await events_of(engine, one)
        ended.append(one.prompt)
        return found

    async def scenario():
        async with running(tmp_path, step=0.05) as engine:
            first, received = asyncio.create_task(note(engine, long)), []
            await asyncio.sleep(0.3)
            await asyncio.gather(*(note(engine, job(f"short {i}", steps=2)) for i in range(3)))
            received = of(events.Step, await first)
            return received, engine.facts()["counters"]["between"]

    steps, between = asyncio.run(scenario())
    assert ended[-1] == "long"
    assert between == 3
    assert [step.done for step in steps] == list(range(1, 41))


def test_short_jobs_take_a_bounded_share_of_the_long_one(tmp_path):
    """However many come, the long job lasts half as long again at most."""
    ended = []

    async def note(engine, one):
        await events_of(engine, one)
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
        async with running(tmp_path, step=step, policy=policy(short_job_share=0.0)) as engine:
            jobs = [one] if when == "running" else [other, one]
            received = {each.id: [] for each in jobs}
            tasks = [asyncio.create_task(events_of(engine, each, received[each.id])) for each in jobs]
            first = jobs[0] if when == "waiting" else one
            await until(lambda: of(events.Step, [event for _, event in received[first.id]]))
            asked = time.monotonic()
            await engine.cancel(one.id)
            await until(lambda: received[one.id] and isinstance(received[one.id][-1][1], events.Failed))
            took = time.monotonic() - asked
            await asyncio.gather(*tasks)
            return took, received[one.id][-1][1], received[jobs[0].id][-1][1]

    took, ended, first = asyncio.run(scenario())
    assert ended.code == events.CANCELLED
    assert took < (0.1 if when == "waiting" else step * 1.2 + 0.5)
    assert when == "running" or isinstance(first, events.Done)
    assert not (tmp_path / f"{one.id}.mp4").exists()


def test_jobs_are_cancelled_while_they_are_decoded(tmp_path):
    """One batch of three whose first video is being decoded, for seconds: the next job does not wait for any of them."""
    jobs, after = [job("finish=4", seed=seed, steps=2) for seed in range(3)], job("after", frames=9)

    async def scenario():
        async with running(tmp_path, policy=policy(short_job_share=0.0)) as engine:
            received = {each.id: [] for each in (*jobs, after)}
            tasks = [asyncio.create_task(events_of(engine, each, received[each.id])) for each in (*jobs, after)]

            def so_far(id):
                return [event for _, event in received[id]]

            await until(lambda: any(events.Stage("decode") in so_far(each.id) for each in jobs))
            asked = time.monotonic()
            for each in jobs:
                await engine.cancel(each.id)
            await until(lambda: of(events.Started, so_far(after.id)))
            took = time.monotonic() - asked
            await asyncio.gather(*tasks)
            return took, [so_far(each.id)[-1] for each in jobs], so_far(after.id)[-1]

    took, ended, last = asyncio.run(scenario())
    assert took < 4 / slow_engine.PARTS + 0.5
    assert [event.code for event in ended] == [events.CANCELLED] * 3
    assert isinstance(last, events.Done)
    assert {path.name.partition(".")[0] for path in tmp_path.iterdir()} == {after.id}


def test_one_job_of_several_is_cancelled_while_another_is_decoded(tmp_path):
    jobs = [job("finish=1", seed=seed, steps=2) for seed in range(3)]

    async def scenario():
        async with running(tmp_path, policy=policy(short_job_share=0.0)) as engine:
            received = [[] for _ in jobs]
            tasks = [asyncio.create_task(events_of(engine, *each)) for each in zip(jobs, received, strict=True)]
            await until(lambda: events.Stage("decode") in [event for _, event in received[0]])
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
            return await events_of(engine, again)

    found = asyncio.run(scenario())
    assert isinstance(found[-1], events.Done)
    assert [step.total for step in of(events.Step, found)] == [2, 2]


def test_a_job_that_is_on_its_way_is_not_taken_twice(tmp_path):
    one = job(steps=20)

    async def scenario():
        async with running(tmp_path) as engine:
            stream = engine.submit(one)
            await anext(stream)
            with pytest.raises(ValueError, match="already pending"):
                await anext(engine.submit(one))
            await stream.aclose()

    asyncio.run(scenario())


def test_closing_gives_waiting_jobs_back_and_lets_running_ones_end(tmp_path):
    async def scenario():
        async with running(tmp_path, step=0.05, policy=policy(short_job_share=0.0)) as engine:
            tasks = [asyncio.create_task(events_of(engine, one)) for one in (job(steps=10), job(frames=9))]
            await asyncio.sleep(0.2)
            await engine.close(10.0)
            late = await events_of(engine, job())
            return await asyncio.gather(*tasks), late, engine.ready

    (ran, waited), late, ready = asyncio.run(scenario())
    assert isinstance(ran[-1], events.Done)
    assert (waited[-1].code, waited[-1].retry) == ("cancelled", True)
    assert late[-1].retry
    assert not ready


def test_closing_without_grace_gives_running_jobs_back_too(tmp_path):
    async def scenario():
        async with running(tmp_path, step=0.2) as engine:
            task = asyncio.create_task(events_of(engine, job(steps=100)))
            await asyncio.sleep(0.3)
            start = time.monotonic()
            await engine.close(0.1)
            return await task, time.monotonic() - start

    found, took = asyncio.run(scenario())
    assert found[-1].retry
    assert took < 2.0
