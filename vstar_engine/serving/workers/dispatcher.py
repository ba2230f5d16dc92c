"""Jobs onto workers: what forms a batch, what goes between, what is tried again, and when a worker is given up."""

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

from .dispatch_state import BatchingPolicy, Link, Message, PendingJob, RunningBatch, WorkerError, WorkerState
from .step_times import StepTimes

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

    def __init__(self, links: Sequence[Link], start: Message, policy: BatchingPolicy):
        self.workers = [WorkerState(link) for link in links]
        self.policy, self.start_message = policy, start
        self.waiting: list[PendingJob] = []
        self.pending: dict[str, PendingJob] = {}
        self.numbers, self.orders = itertools.count(1), itertools.count()
        self.step_times = StepTimes()
        self.described: dict[str, Any] = {}
        self.counts = {"restarts": 0, "retried": 0, "batches": 0, "batched_jobs": 0, "between": 0}
        self.news = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []
        self.closing = False

    async def start(self) -> None:
        """Starts every worker; returns when the first is ready, raises WorkerError where that one cannot be started."""
        opened = [asyncio.create_task(self._open(worker)) for worker in self.workers]
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self._abandon, opened)
            done, _ = await asyncio.wait(opened, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            undo.pop_all()
        tended = (self._tend(worker, opening) for worker, opening in zip(self.workers, opened, strict=True))
        self.tasks = [asyncio.create_task(each) for each in (*tended, self._pump(), self._watch())]

    async def run(self) -> None:
        """Goes on until the engine is closed; raises what broke it."""
        ended, _ = await asyncio.wait(self.tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()

    async def _abandon(self, opened: "Sequence[asyncio.Task[Any]]") -> None:
        """Ends workers whose start failed or was given up."""
        await _stop(opened)
        await asyncio.gather(*(worker.link.kill() for worker in self.workers))

    @property
    def ready(self) -> bool:
        return not self.closing and any(worker.ready for worker in self.workers)

    def facts(self) -> dict[str, Any]:
        """Describes the model, and counts what happened on the workers."""
        running = sum(len(worker.jobs) for worker in self.workers)
        now = {"waiting": len(self.waiting), "running": running, "workers": sum(worker.ready for worker in self.workers)}
        caches = {name: sum(worker.counters.get(name, 0) for worker in self.workers) for name in CACHES}
        return {**self.described, "counters": {**self.counts, **now, **caches}}

    async def submit(self, job: Job) -> AsyncIterator[events.Event]:
        """Makes a job's video; a stream that is closed before its end cancels the job."""
        while (before := self.pending.get(job.id)) is not None:
            if not before.cancelled:
                raise ValueError(f"job {job.id} is on its way already")
            await before.over.wait()
        if self.closing:
            yield _closed()
            return
        pending = PendingJob(job, next(self.orders), time.monotonic())
        self.pending[job.id] = pending
        self._queue(pending)
        try:
            while True:
                event = await pending.stream.get()
                yield event
                if isinstance(event, events.Done | events.Failed):
                    return
        finally:
            if not pending.over.is_set():
                await self.cancel(job.id)

    async def cancel(self, id: str) -> None:
        """Stops a job: one that waits at once, one on a worker before its next step."""
        pending = self.pending.get(id)
        if pending is None:
            return
        pending.cancelled = True
        if pending.worker is None:
            self.waiting.remove(pending)
            self._end(pending, _cancelled())
        else:
            pending.worker.link.send({"do": "cancel", "id": id})

    async def close(self, grace: float) -> None:
        """Ends the workers; jobs on them have `grace` seconds, jobs that wait are given back at once."""
        self.closing = True
        for pending in [*self.waiting]:
            self._end(pending, _closed())
        self.waiting.clear()
        ends = [pending.over.wait() for worker in self.workers for pending in worker.jobs]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*ends), grace)
        await _stop(self.tasks)
        await asyncio.gather(*(worker.link.kill() for worker in self.workers))
        for pending in [*self.pending.values()]:
            self._end(pending, _closed())

    # --- workers

    async def _open(self, worker: WorkerState) -> AsyncIterator[Message]:
        """Starts a worker's process and waits until it is ready."""
        known = {name: self.described[name] for name in ("batch_limits", "stage_seconds") if name in self.described}
        policy = self.policy
        message = {
            **self.start_message,
            "buckets": policy.buckets,
            "max_batch": policy.max_batch,
            "fast": policy.fast,
            "known": known,
            "log": log.getEffectiveLevel(),
            "log_json": json_log.as_json(),
        }
        try:
            stream = await worker.link.open({"do": "start", **message})
        except OSError as error:
            raise WorkerError(f"{worker.link.name} cannot be started: {error}") from error
        try:
            async with asyncio.timeout(policy.start_timeout):
                first = await anext(stream, None)
        except TimeoutError:
            await worker.link.kill()
            raise WorkerError(f"{worker.link.name} was not ready after {policy.start_timeout:.0f} s") from None
        if first is None:
            raise WorkerError(f"{worker.link.name} ended before it was ready; its log says why")
        if first["say"] == "refused":
            await worker.link.kill()
            raise WorkerError(first["message"], first["exit_code"])
        worker.facts = first["facts"]
        self.described = {**self.described, **worker.facts}
        self.step_times.add_measured(worker.facts["stage_seconds"])
        worker.ready, worker.silent, worker.fault = True, 0.0, events.WORKER_CRASHED
        self.news.set()
        return stream

    async def _tend(self, worker: WorkerState, opening: "asyncio.Task[AsyncIterator[Message]]") -> None:
        """Hears a worker until it is gone, then starts it again, for as long as the engine is open."""
        try:
            stream = await opening
        except WorkerError as error:
            log.error("%s", error)
            stream = await self._reopen(worker)
        while True:
            async for message in stream:
                worker.silent = 0.0
                self._receive(worker, message)
            worker.ready = False
            log.warning("%s is gone (%s)", worker.link.name, worker.fault)
            await worker.link.kill()
            self._lose(worker)
            stream = await self._reopen(worker)
            self.counts["restarts"] += 1

    async def _reopen(self, worker: WorkerState) -> AsyncIterator[Message]:
        pause = RETRY_FIRST
        while True:
            try:
                return await self._open(worker)
            except WorkerError as error:
                log.error("%s cannot be started again, next try in %.1f s: %s", worker.link.name, pause, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, RETRY_LAST)

    async def _watch(self) -> None:
        """Ends workers that hang. Time is counted in ticks, so that a pause of this very process is no one's fault."""
        while True:
            await asyncio.sleep(TICK)
            for worker in self.workers:
                if not worker.ready or not worker.jobs:
                    worker.silent = 0.0
                    continue
                worker.silent += TICK
                if worker.silent > self._patience(worker):
                    log.error("%s has been silent for %.1f s: it is ended", worker.link.name, worker.silent)
                    worker.fault, worker.silent = events.WORKER_HUNG, 0.0
                    await worker.link.kill()

    def _patience(self, worker: WorkerState) -> float:
        least = self.policy.hang_after
        if least is None:
            least = PATIENCE["cpu" if worker.facts["device"].startswith("cpu") else "gpu"]
        longest = max(
            (self.step_times.longest_silence(batch.job, len(batch.jobs)) for batch in worker.batches.values()), default=0.0
        )
        return max(HUNG_FACTOR * longest, least)

    def _receive(self, worker: WorkerState, message: Message) -> None:
        if message["say"] == "event":
            pending = self.pending.get(message["id"])
            if pending is not None and pending.worker is worker:
                self._deliver(pending, events.event_from(message["event"]))
        elif message["say"] == "free":
            batch = worker.batches.pop(message["run"])
            if message["steps"]:
                self.step_times.update(batch.job, len(batch.jobs), message["seconds"]["denoise"] / message["steps"])
            worker.counters = message["counters"]
            self.news.set()
        elif message["say"] == "failed":
            for id in message["ids"]:
                if (pending := self.pending.get(id)) is not None and pending.worker is worker:
                    self._failed(pending, message["code"], message["message"])
        else:
            raise ValueError(f"a worker says event, free or failed, got {message['say']!r}")

    def _deliver(self, pending: PendingJob, event: events.Event) -> None:
        if isinstance(event, events.Done | events.Failed):
            self._end(pending, event)
            return
        if isinstance(event, events.Step) and pending.worker is not None:
            for batch in pending.worker.batches.values():
                if pending in batch.jobs:
                    batch.done = event.done
        pending.stream.put_nowait(event)

    def _failed(self, pending: PendingJob, code: str, message: str) -> None:
        """Tries a job alone that failed in company; one that was alone has failed."""
        if pending.cancelled:
            self._end(pending, _cancelled())
        elif pending.together:
            self._again([pending])
        else:
            self._end(pending, events.Failed(code, message))

    def _lose(self, worker: WorkerState) -> None:
        """Takes a dead worker's jobs back: each is tried again, alone, for any of them may have been the cause.

        Those whose video was only being written are not suspected while others were on the device.
        """
        running = {pending for batch in worker.batches.values() for pending in batch.jobs}
        suspects = (running & worker.jobs) or worker.jobs
        worker.batches.clear()
        again = []
        for pending in sorted(worker.jobs, key=lambda pending: pending.rank):
            pending.tries += pending in suspects
            if pending.cancelled:
                self._end(pending, _cancelled())
            elif pending.tries >= self.policy.tries:
                what = "hung" if worker.fault == events.WORKER_HUNG else "died"
                self._end(
                    pending, events.Failed(worker.fault, f"the worker {what} {pending.tries} times while making this video")
                )
            else:
                again.append(pending)
        self._again(again)

    def _again(self, jobs: Iterable[PendingJob]) -> None:
        for pending in jobs:
            assert pending.worker is not None
            pending.worker.jobs.discard(pending)
            pending.worker, pending.alone = None, True
            self.counts["retried"] += 1
            self._queue(pending)

    def _end(self, pending: PendingJob, event: events.Event) -> None:
        if pending.worker is not None:
            pending.worker.jobs.discard(pending)
        pending.worker = None
        del self.pending[pending.job.id]
        pending.stream.put_nowait(event)
        pending.over.set()
        self.news.set()

    # --- which job goes where

    def _queue(self, pending: PendingJob) -> None:
        self.waiting.append(pending)
        self.waiting.sort(key=lambda pending: pending.rank)
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
        for worker in sorted(self.workers, key=lambda worker: len(worker.batches)):
            if not worker.ready:
                continue
            jobs, pause = self._next(worker) if not worker.batches else (self._between(worker), None)
            if jobs:
                self._put(worker, jobs)
                pause = 0.0
            if pause is not None:
                pauses.append(pause)
        return min(pauses, default=None)

    def _next(self, worker: WorkerState) -> tuple[list[PendingJob], float | None]:
        """Chooses the batch for an idle worker, or says how long to wait for one."""
        if not self.waiting:
            return [], None
        first = self.waiting[0]
        if first.alone and worker.jobs:  # videos are being written: their end is heard of
            return [], None
        idle = sum(worker.ready and not worker.batches for worker in self.workers)
        found = self._like(worker, first, idle)
        left = first.arrived + self.policy.batch_delay - time.monotonic()
        if not first.alone and idle == 1 and len(found) < self._limit(worker, first.job) and left > 0:
            return [], left
        return found, None

    def _like(self, worker: WorkerState, first: PendingJob, workers: int = 1) -> list[PendingJob]:
        """Returns the jobs to batch with one, that one first; such jobs are spread over so many workers."""
        if first.alone:
            return [first]
        alike = [pending for pending in self.waiting if pending.job.shape == first.job.shape and not pending.alone]
        return alike[: min(self._limit(worker, first.job), -(-len(alike) // workers))]

    def _limit(self, worker: WorkerState, job: Job) -> int:
        limits: Mapping[str, int] = worker.facts["batch_limits"]
        return limits.get("x".join(map(str, (job.frames, *job.size))), 1)

    def _between(self, worker: WorkerState) -> list[PendingJob]:
        """Chooses short jobs that go between the steps of the one batch on a worker, while that can lend the time."""
        (batch, *others) = worker.batches.values()
        if others or batch.jobs[0].alone:
            return []
        for first in self.waiting:
            found = self._like(worker, first)
            takes = self.step_times.batch_seconds(first.job, len(found))
            short = takes <= self.policy.short_job_share * batch.left
            bearable = batch.interleaved + takes <= self.policy.interleaved_share * batch.expected
            if short and bearable and not first.alone:
                batch.interleaved += takes
                self.counts["between"] += len(found)
                return found
        return []

    def _put(self, worker: WorkerState, jobs: list[PendingJob]) -> None:
        number = next(self.numbers)
        for pending in jobs:
            self.waiting.remove(pending)
            pending.worker = worker
        beside = [pending for batch in worker.batches.values() for pending in batch.jobs]
        worker.batches[number] = RunningBatch(jobs, self.step_times.batch_seconds(jobs[0].job, len(jobs)), time.monotonic())
        worker.jobs.update(jobs)
        if len(jobs) + len(beside) > 1:
            for pending in (*jobs, *beside):
                pending.together = True
        else:
            jobs[0].together = False
        worker.silent = 0.0
        self.counts["batches"] += 1
        self.counts["batched_jobs"] += len(jobs)
        worker.link.send({"do": "run", "run": number, "jobs": [pending.job.to_json() for pending in jobs]})


async def _stop(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _cancelled() -> events.Failed:
    return events.Failed(events.CANCELLED, "the job was cancelled")


def _closed() -> events.Failed:
    return events.Failed(events.CANCELLED, "the engine is closing", retry=True)
