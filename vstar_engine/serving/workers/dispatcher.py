"""Jobs onto workers: what rides together, what goes between, what is tried again, and when a worker is given up."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

from vstar_engine.serving.jobs import events
from vstar_engine.serving.jobs.job import Job
from vstar_engine.serving.telemetry import json_log

from .dispatch_state import Lane, Link, Message, Ride, Rules, Ticket, WorkerError
from .step_times import Pace

log = logging.getLogger(__name__)

# a worker is looked after so often, in seconds
TICK = 0.1
# a worker is hung when it says nothing for so many times what its work should take, and at least for PATIENCE seconds
HUNG_FACTOR = 3.0
PATIENCE = {"cpu": 60.0, "gpu": 10.0}
# seconds before a worker that would not start is tried again: doubled each time, up to the last
RETRY_FIRST, RETRY_LAST = 0.2, 10.0
# what a worker counts of its cache of embeddings, since it started
CACHES = ("cache_hits", "cache_misses", "cache_bytes")


class Dispatcher:
    """An `EngineClient` in front of one or more workers."""

    def __init__(self, links: Sequence[Link], start: Message, rules: Rules):
        self.lanes = [Lane(link) for link in links]
        self.rules, self.start_message = rules, start
        self.waiting: list[Ticket] = []
        self.tickets: dict[str, Ticket] = {}
        self.numbers, self.orders = itertools.count(1), itertools.count()
        self.pace = Pace()
        self.described: dict[str, Any] = {}
        self.counts = {"restarts": 0, "retried": 0, "batches": 0, "batched_jobs": 0, "between": 0}
        self.news, self.riding = asyncio.Event(), asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []
        self.closing = False

    async def start(self) -> None:
        """Starts every worker; returns when the first is ready, raises WorkerError where that one cannot be started."""
        opened = [asyncio.create_task(self._open(lane)) for lane in self.lanes]
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self._abandon, opened)
            done, _ = await asyncio.wait(opened, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            undo.pop_all()
        tended = (self._tend(lane, opening) for lane, opening in zip(self.lanes, opened, strict=True))
        self.tasks = [asyncio.create_task(each) for each in (*tended, self._pump(), self._watch())]

    async def run(self) -> None:
        """Goes on until the engine is closed; raises what broke it."""
        ended, _ = await asyncio.wait(self.tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()

    async def _abandon(self, opened: "Sequence[asyncio.Task[Any]]") -> None:
        """Ends workers whose start failed or was given up."""
        await _stop(opened)
        await asyncio.gather(*(lane.link.kill() for lane in self.lanes))

    @property
    def ready(self) -> bool:
        return not self.closing and any(lane.up for lane in self.lanes)

    def facts(self) -> dict[str, Any]:
        """Describes the model, and counts what happened on the workers."""
        running = sum(len(lane.tickets) for lane in self.lanes)
        now = {"waiting": len(self.waiting), "running": running, "workers": sum(lane.up for lane in self.lanes)}
        caches = {name: sum(lane.counters.get(name, 0) for lane in self.lanes) for name in CACHES}
        return {**self.described, "counters": {**self.counts, **now, **caches}}

    async def submit(self, job: Job) -> AsyncIterator[events.Event]:
        """Makes a job's video; a stream that is closed before its end cancels the job."""
        while (before := self.tickets.get(job.id)) is not None:
            if not before.cancelled:
                raise ValueError(f"job {job.id} is on its way already")
            await before.over.wait()
        if self.closing:
            yield _closed()
            return
        ticket = Ticket(job, next(self.orders), time.monotonic())
        self.tickets[job.id] = ticket
        self._queue(ticket)
        try:
            while True:
                event = await ticket.heard.get()
                yield event
                if isinstance(event, events.Done | events.Failed):
                    return
        finally:
            if not ticket.over.is_set():
                await self.cancel(job.id)

    async def cancel(self, id: str) -> None:
        """Stops a job: one that waits at once, one on a worker before its next step."""
        ticket = self.tickets.get(id)
        if ticket is None:
            return
        ticket.cancelled = True
        if ticket.lane is None:
            self.waiting.remove(ticket)
            self._end(ticket, _cancelled())
        else:
            ticket.lane.link.send({"do": "cancel", "id": id})

    async def close(self, grace: float) -> None:
        """Ends the workers; jobs on them have `grace` seconds, jobs that wait are given back at once."""
        self.closing = True
        for ticket in [*self.waiting]:
            self._end(ticket, _closed())
        self.waiting.clear()
        riding = [ticket.over.wait() for lane in self.lanes for ticket in lane.tickets]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*riding), grace)
        await _stop(self.tasks)
        await asyncio.gather(*(lane.link.kill() for lane in self.lanes))
        for ticket in [*self.tickets.values()]:
            self._end(ticket, _closed())

    # --- workers

    async def _open(self, lane: Lane) -> AsyncIterator[Message]:
        """Starts a lane's worker and waits until it is ready."""
        known = {name: self.described[name] for name in ("batch_limits", "paces") if name in self.described}
        rules = self.rules
        message = {
            **self.start_message,
            "buckets": rules.buckets,
            "max_batch": rules.max_batch,
            "fast": rules.fast,
            "known": known,
            "log": log.getEffectiveLevel(),
            "log_json": json_log.as_json(),
        }
        try:
            stream = await lane.link.open({"do": "start", **message})
        except OSError as error:
            raise WorkerError(f"{lane.link.name} cannot be started: {error}") from error
        try:
            async with asyncio.timeout(rules.start_timeout):
                first = await anext(stream, None)
        except TimeoutError:
            await lane.link.kill()
            raise WorkerError(f"{lane.link.name} was not ready after {rules.start_timeout:.0f} s") from None
        if first is None:
            raise WorkerError(f"{lane.link.name} ended before it was ready; its log says why")
        if first["say"] == "refused":
            await lane.link.kill()
            raise WorkerError(first["message"], first["exit_code"])
        lane.facts = first["facts"]
        self.described = {**self.described, **lane.facts}
        self.pace.learn(lane.facts["paces"])
        lane.up, lane.silent, lane.fault = True, 0.0, events.WORKER_CRASHED
        self.news.set()
        return stream

    async def _tend(self, lane: Lane, opening: "asyncio.Task[AsyncIterator[Message]]") -> None:
        """Hears a worker until it is gone, then starts it again, for as long as the engine is open."""
        try:
            stream = await opening
        except WorkerError as error:
            log.error("%s", error)
            stream = await self._reopen(lane)
        while True:
            async for message in stream:
                lane.silent = 0.0
                self._hear(lane, message)
            lane.up = False
            log.warning("%s is gone (%s)", lane.link.name, lane.fault)
            await lane.link.kill()
            self._lose(lane)
            stream = await self._reopen(lane)
            self.counts["restarts"] += 1

    async def _reopen(self, lane: Lane) -> AsyncIterator[Message]:
        pause = RETRY_FIRST
        while True:
            try:
                return await self._open(lane)
            except WorkerError as error:
                log.error("%s cannot be started again, next try in %.1f s: %s", lane.link.name, pause, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, RETRY_LAST)

    async def _watch(self) -> None:
        """Ends workers that hang. Time is counted in ticks, so that a pause of this very process is no one's fault."""
        while True:
            if not any(lane.tickets for lane in self.lanes):
                self.riding.clear()
                await self.riding.wait()
            await asyncio.sleep(TICK)
            for lane in self.lanes:
                if not lane.up or not lane.tickets:
                    lane.silent = 0.0
                    continue
                lane.silent += TICK
                if lane.silent > self._patience(lane):
                    log.error("%s has been silent for %.1f s: it is ended", lane.link.name, lane.silent)
                    lane.fault, lane.silent = events.WORKER_HUNG, 0.0
                    await lane.link.kill()

    def _patience(self, lane: Lane) -> float:
        least = self.rules.hang_after
        if least is None:
            least = PATIENCE["cpu" if lane.facts["device"].startswith("cpu") else "gpu"]
        longest = max((self.pace.longest(ride.job, len(ride.tickets)) for ride in lane.rides.values()), default=0.0)
        return max(HUNG_FACTOR * longest, least)

    def _hear(self, lane: Lane, message: Message) -> None:
        if message["say"] == "event":
            ticket = self.tickets.get(message["id"])
            if ticket is not None and ticket.lane is lane:
                self._tell(ticket, events.event_from(message["event"]))
        elif message["say"] == "free":
            ride = lane.rides.pop(message["run"])
            if message["steps"]:
                self.pace.note(ride.job, len(ride.tickets), message["seconds"]["denoise"] / message["steps"])
            lane.counters = message["counters"]
            self.news.set()
        elif message["say"] == "failed":
            for id in message["ids"]:
                if (ticket := self.tickets.get(id)) is not None and ticket.lane is lane:
                    self._failed(ticket, message["code"], message["message"])
        else:
            raise ValueError(f"a worker says event, free or failed, got {message['say']!r}")

    def _tell(self, ticket: Ticket, event: events.Event) -> None:
        if isinstance(event, events.Done | events.Failed):
            self._end(ticket, event)
            return
        if isinstance(event, events.Step) and ticket.lane is not None:
            for ride in ticket.lane.rides.values():
                if ticket in ride.tickets:
                    ride.done = event.done
        ticket.heard.put_nowait(event)

    def _failed(self, ticket: Ticket, code: str, message: str) -> None:
        """Tries a job alone that failed in company; one that was alone has failed."""
        if ticket.cancelled:
            self._end(ticket, _cancelled())
        elif ticket.together:
            self._again([ticket])
        else:
            self._end(ticket, events.Failed(code, message))

    def _lose(self, lane: Lane) -> None:
        """Takes a dead worker's jobs back: each is tried again, alone, for any of them may have been the cause.

        Those whose video was only being written are not suspected while others were on the device.
        """
        riding = {ticket for ride in lane.rides.values() for ticket in ride.tickets}
        suspects = (riding & lane.tickets) or lane.tickets
        lane.rides.clear()
        again = []
        for ticket in sorted(lane.tickets, key=lambda ticket: ticket.rank):
            ticket.tries += ticket in suspects
            if ticket.cancelled:
                self._end(ticket, _cancelled())
            elif ticket.tries >= self.rules.tries:
                what = "hung" if lane.fault == events.WORKER_HUNG else "died"
                self._end(ticket, events.Failed(lane.fault, f"the worker {what} {ticket.tries} times while making this video"))
            else:
                again.append(ticket)
        self._again(again)

    def _again(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            assert ticket.lane is not None
            ticket.lane.tickets.discard(ticket)
            ticket.lane, ticket.alone = None, True
            self.counts["retried"] += 1
            self._queue(ticket)

    def _end(self, ticket: Ticket, event: events.Event) -> None:
        if ticket.lane is not None:
            ticket.lane.tickets.discard(ticket)
        ticket.lane = None
        del self.tickets[ticket.job.id]
        ticket.heard.put_nowait(event)
        ticket.over.set()
        self.news.set()

    # --- which job goes where

    def _queue(self, ticket: Ticket) -> None:
        self.waiting.append(ticket)
        self.waiting.sort(key=lambda ticket: ticket.rank)
        self.news.set()

    async def _pump(self) -> None:
        """Puts jobs onto workers whenever something changed, or company has been waited for."""
        pause: float | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait(), pause)
            self.news.clear()
            pause = self._fill()

    def _fill(self) -> float | None:
        """Puts what can go onto workers; gives the seconds after which more may."""
        pauses = []
        for lane in sorted(self.lanes, key=lambda lane: len(lane.rides)):
            if not lane.up:
                continue
            tickets, pause = self._next(lane) if not lane.rides else (self._between(lane), None)
            if tickets:
                self._put(lane, tickets)
                pause = 0.0
            if pause is not None:
                pauses.append(pause)
        return min(pauses, default=None)

    def _next(self, lane: Lane) -> tuple[list[Ticket], float | None]:
        """Chooses the batch for an idle worker, or says how long to wait for one."""
        if not self.waiting:
            return [], None
        first = self.waiting[0]
        if first.alone and lane.tickets:  # videos are being written: their end is heard of
            return [], None
        idle = sum(lane.up and not lane.rides for lane in self.lanes)
        found = self._like(lane, first, idle)
        left = first.arrived + self.rules.batch_delay - time.monotonic()
        if not first.alone and idle == 1 and len(found) < self._limit(lane, first.job) and left > 0:
            return [], left
        return found, None

    def _like(self, lane: Lane, first: Ticket, lanes: int = 1) -> list[Ticket]:
        """Returns the jobs that ride with one, that one first; such jobs are spread over so many lanes."""
        if first.alone:
            return [first]
        alike = [ticket for ticket in self.waiting if ticket.job.shape == first.job.shape and not ticket.alone]
        return alike[: min(self._limit(lane, first.job), -(-len(alike) // lanes))]

    def _limit(self, lane: Lane, job: Job) -> int:
        limits: Mapping[str, int] = lane.facts["batch_limits"]
        return limits.get("x".join(map(str, (job.frames, *job.size))), 1)

    def _between(self, lane: Lane) -> list[Ticket]:
        """Chooses short jobs that go between the steps of the one batch on a worker, while that can lend the time."""
        (ride, *others) = lane.rides.values()
        if others or ride.tickets[0].alone:
            return []
        for first in self.waiting:
            found = self._like(lane, first)
            takes = self.pace.whole(first.job, len(found))
            fits = takes <= self.rules.short * ride.left and ride.lent + takes <= self.rules.lent * ride.expected
            if not first.alone and fits:
                ride.lent += takes
                self.counts["between"] += len(found)
                return found
        return []

    def _put(self, lane: Lane, tickets: list[Ticket]) -> None:
        number = next(self.numbers)
        for ticket in tickets:
            self.waiting.remove(ticket)
            ticket.lane = lane
        beside = [ticket for ride in lane.rides.values() for ticket in ride.tickets]
        lane.rides[number] = Ride(tickets, self.pace.whole(tickets[0].job, len(tickets)), time.monotonic())
        lane.tickets.update(tickets)
        if len(tickets) + len(beside) > 1:
            for ticket in (*tickets, *beside):
                ticket.together = True
        else:
            tickets[0].together = False
        lane.silent = 0.0
        self.riding.set()
        self.counts["batches"] += 1
        self.counts["batched_jobs"] += len(tickets)
        lane.link.send({"do": "run", "run": number, "jobs": [ticket.job.to_json() for ticket in tickets]})


async def _stop(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _cancelled() -> events.Failed:
    return events.Failed(events.CANCELLED, "the job was cancelled")


def _closed() -> events.Failed:
    return events.Failed(events.CANCELLED, "the engine is closing", retry=True)
