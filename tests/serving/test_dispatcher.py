"""Several workers behind one dispatcher, played by this test itself: who gets which job, and what a start may meet."""

import asyncio

import pytest

from support.slow_engine import job
from vstar_engine.serving.jobs import events
from vstar_engine.serving.workers.dispatch_state import BatchingPolicy, WorkerError
from vstar_engine.serving.workers.dispatcher import Dispatcher

LIMIT = 20.0
MEASURED = {"batch_limits": {"8x32x64": 4}, "stage_seconds": {"8x32x64": {"begin": 0.0, "step": 1.0, "finish": 0.0}}}


class ScriptedLink:
    """A link whose worker is this test: it is ready at once, or says what `refused` holds, or raises it."""

    def __init__(self, name, refused=None, after=0.0):
        self.name, self.refused, self.after = name, refused, after
        self.sent, self.opened, self.says = [], 0, None

    async def open(self, message):
        self.opened += 1
        if isinstance(self.refused, OSError):
            raise self.refused
        await asyncio.sleep(self.after)
        self.says = asyncio.Queue()
        if self.refused:
            self.say({"say": "refused", "message": self.refused, "exit_code": 3})
        else:
            self.say({"say": "ready", "facts": {"device": "none", **MEASURED}})
        return self.stream()

    async def stream(self):
        while (message := await self.says.get()) is not None:
            yield message

    def say(self, message):
        self.says.put_nowait(message)

    def send(self, message):
        self.sent.append(message)

    async def kill(self):
        if self.says is not None:
            self.says.put_nowait(None)

    @property
    def runs(self):
        return [message for message in self.sent if message["do"] == "run"]

    def finish(self, run):
        """Ends a run's jobs well."""
        for one in run["jobs"]:
            done = events.Done(f"{one['id']}.mp4", 1, "", 8, 64, 32)
            self.say({"say": "event", "id": one["id"], "event": done.to_json()})
        self.say({"say": "free", "run": run["run"], "seconds": {"denoise": 5.0}, "steps": 5, "counters": {"cache_hits": 2}})


def scenario(links, act, **changed):
    """Runs `act(dispatcher)` between a start and a close."""

    async def run():
        dispatcher = Dispatcher(links, {}, BatchingPolicy(**{"batch_delay": 0.05, **changed}))
        async with asyncio.timeout(LIMIT):
            await dispatcher.start()
            try:
                return await act(dispatcher)
            finally:
                await dispatcher.close(0)

    return asyncio.run(run())


async def events_of(dispatcher, one):
    return [event async for event in dispatcher.submit(one)]


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def submit(dispatcher, *jobs):
    return [asyncio.create_task(events_of(dispatcher, one)) for one in jobs]


def test_jobs_are_spread_over_idle_workers_before_they_are_batched():
    links = [ScriptedLink("a"), ScriptedLink("b")]

    async def act(dispatcher):
        await until(lambda: all(worker.ready for worker in dispatcher.workers))
        tasks = submit(dispatcher, *(job(seed=seed) for seed in range(4)))
        await until(lambda: all(link.runs for link in links))
        sizes = [len(link.runs[0]["jobs"]) for link in links]
        for link in links:
            link.finish(link.runs[0])
        return sizes, [found[-1].kind for found in await asyncio.gather(*tasks)], dispatcher.facts()["counters"]

    sizes, ends, counters = scenario(links, act)
    assert sizes == [2, 2]
    assert ends == ["done"] * 4
    assert (counters["batches"], counters["batched_jobs"], counters["cache_hits"]) == (2, 4, 4)


def test_a_start_waits_for_the_first_worker_only():
    links = [ScriptedLink("a", after=60.0), ScriptedLink("b")]

    async def act(dispatcher):
        (task,) = submit(dispatcher, job())
        await until(lambda: links[1].runs)
        links[1].finish(links[1].runs[0])
        return dispatcher.ready, dispatcher.facts()["counters"]["workers"], (await task)[-1].kind

    assert scenario(links, act) == (True, 1, "done")


@pytest.mark.parametrize(
    ("refused", "complaint", "code"),
    [("unknown model 'maxi'", "unknown model", 3), (OSError("no more processes"), "a cannot be started: no more processes", 1)],
    ids=str,
)
def test_a_first_worker_that_cannot_start_ends_the_start(refused, complaint, code):
    with pytest.raises(WorkerError, match=complaint) as found:
        scenario([ScriptedLink("a", refused)], None)
    assert found.value.exit_code == code


def test_a_worker_that_will_not_start_again_is_tried_until_it_does():
    link = ScriptedLink("a")

    async def act(dispatcher):
        (task,) = submit(dispatcher, job())
        await until(lambda: link.runs)
        link.refused = OSError("no more processes")
        await link.kill()
        await until(lambda: link.opened >= 4)
        ready, link.refused = dispatcher.ready, None
        await until(lambda: len(link.runs) == 2)
        link.finish(link.runs[1])
        return ready, (await task)[-1].kind

    assert scenario([link], act, restart_pause=0.02) == (False, "done")


def test_jobs_of_a_worker_that_dies_go_to_another():
    links = [ScriptedLink("a"), ScriptedLink("b", after=0.1)]

    async def act(dispatcher):
        (task,) = submit(dispatcher, job())
        await until(lambda: links[0].runs and dispatcher.workers[1].ready)
        links[0].after = 60.0
        await links[0].kill()
        await until(lambda: links[1].runs)
        links[1].finish(links[1].runs[0])
        return (await task)[-1].kind

    assert scenario(links, act) == "done"


def test_a_job_that_died_with_others_is_tried_alone_on_a_worker_without_any():
    """Its company must not die with it again."""
    link = ScriptedLink("a")

    async def act(dispatcher):
        tasks = submit(dispatcher, *(job(seed=seed) for seed in range(3)))
        await until(lambda: link.runs)
        await link.kill()
        await until(lambda: len(link.runs) == 2)
        sizes = [len(run["jobs"]) for run in link.runs]
        for number in (1, 2, 3):
            await until(lambda number=number: len(link.runs) > number)
            link.finish(link.runs[number])
        await asyncio.gather(*tasks)
        return sizes, [len(run["jobs"]) for run in link.runs]

    assert scenario([link], act) == ([3, 1], [3, 1, 1, 1])


def test_what_a_worker_says_of_jobs_that_are_gone_is_not_minded():
    link = ScriptedLink("a")

    async def act(dispatcher):
        (task,) = submit(dispatcher, job())
        await until(lambda: link.runs)
        link.say({"say": "event", "id": "video_of_nobody", "event": events.Stage("text").to_json()})
        link.say({"say": "failed", "ids": ["video_of_nobody"], "code": "out_of_memory", "message": ""})
        link.finish(link.runs[0])
        return (await task)[-1].kind

    assert scenario([link], act) == "done"


def test_a_dispatcher_that_breaks_says_so():
    """A worker that speaks another language would else leave an engine that is ready and makes nothing."""
    link = ScriptedLink("one")

    async def act(dispatcher):
        link.say({"say": "something else"})
        with pytest.raises(ValueError, match="a worker sends event, free or failed"):
            await dispatcher.run()

    scenario([link], act)
