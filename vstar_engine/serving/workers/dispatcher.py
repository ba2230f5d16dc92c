"""Schedules jobs on workers: batching, interleaving, retries, hang detection."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from vstar_engine.serving.jobs import events
from vstar_engine.serving.jobs.job import Job
from vstar_engine.serving.telemetry import json_log

from .batching import WaitingJobs
from .dispatch_state import BatchingPolicy, Link, Message, PendingJob, RunningBatch, WorkerError, WorkerState
from .step_times import StepTimes

log = logging.getLogger(__name__)

# seconds between two checks for hung workers
TICK = 0.1
# a worker hangs when it is silent for this multiple of its longest stage, and at least for LEAST_SILENCE seconds
HUNG_FACTOR = 3.0
LEAST_SILENCE = {"cpu": 60.0, "gpu": 10.0}
# longest pause in seconds before a failed restart is repeated; it is doubled each time
LONGEST_PAUSE = 10.0
# counters of a worker's embedding cache since it started
CACHES = ("cache_hits", "cache_misses", "cache_bytes")


class Dispatcher:
    """An `EngineClient` that runs jobs on one or more workers."""

    def __init__(self, links: Sequence[Link], start: Message, policy: BatchingPolicy):
        self.workers = [WorkerState(link) for link in links]
        self.policy, self.start_message = policy, start
        self.pending: dict[str, PendingJob] = {}
        self.numbers, self.orders = itertools.count(1), itertools.count()
        self.step_times = StepTimes()
        self.waiting = WaitingJobs(policy, self.step_times)
        self.described: dict[str, Any] = {}
        self.counts = {"restarts": 0, "retried": 0, "batches": 0, "batched_jobs": 0, "between": 0}
        self.news, self.running = asyncio.Event(), asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []
        self.closing = False

    async def start(self) -> None:
        """Starts every worker; returns when the first is ready. Raises WorkerError if the first to answer cannot start."""
        opened = [asyncio.create_task(self._open(worker)) for worker in self.workers]
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self._abandon, opened)
            done, _ = await asyncio.wait(opened, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            undo.pop_all()
        tended = (self._supervise(worker, opening) for worker, opening in zip(self.workers, opened, strict=True))
        self.tasks = [asyncio.create_task(each) for each in (*tended, self._schedule(), self._detect_hangs())]

    async def run(self) -> None:
        """Runs until the engine is closed; raises the error of a background task."""
        ended, _ = await asyncio.wait(self.tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()

    async def _abandon(self, opened: "Sequence[asyncio.Task[Any]]") -> None:
        """Stops all workers after a failed or cancelled start."""
        await _stop(opened)
        await asyncio.gather(*(worker.link.kill() for worker in self.workers))

    @property
    def ready(self) -> bool:
        return not self.closing and any(worker.ready for worker in self.workers)

    def facts(self) -> dict[str, Any]:
        """Returns the facts of the model and the counters of all workers; see `events.FACTS`."""
        running = sum(len(worker.jobs) for worker in self.workers)
        now = {"waiting": len(self.waiting), "running": running, "workers": sum(worker.ready for worker in self.workers)}
        caches = {name: sum(worker.counters.get(name, 0) for worker in self.workers) for name in CACHES}
        return {**self.described, "counters": {**self.counts, **now, **caches}}

    async def submit(self, job: Job) -> AsyncIterator[events.Event]:
        """Yields a job's events until Done or Failed. Closing the iterator earlier cancels the job."""
        while (before := self.pending.get(job.id)) is not None:
            if not before.cancelled:
                raise ValueError(f"job {job.id} is already pending")
            await before.over.wait()
        if self.closing:
            yield _closed()
            return
        pending = PendingJob(job, next(self.orders), time.monotonic())
        self.pending[job.id] = pending
        self._enqueue(pending)
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
        """Cancels a job: a waiting one at once, a running one before its next step."""
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
        """Stops the workers. Waiting jobs fail with `retry` at once; running jobs have `grace` seconds to end."""
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
        """Starts a worker and waits until it is ready; returns its messages."""
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

    async def _supervise(self, worker: WorkerState, opening: "asyncio.Task[AsyncIterator[Message]]") -> None:
        """Handles a worker's messages until it ends, then restarts it; runs until the engine is closed."""
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
            log.warning("%s ended (%s) and is restarted", worker.link.name, worker.fault)
            await worker.link.kill()
            self._take_back_jobs(worker)
            stream = await self._reopen(worker)
            self.counts["restarts"] += 1

    async def _reopen(self, worker: WorkerState) -> AsyncIterator[Message]:
        """Starts a worker again, with growing pauses until it succeeds."""
        pause = self.policy.restart_pause
        while True:
            try:
                return await self._open(worker)
            except WorkerError as error:
                log.error("%s cannot be started again, next try in %.1f s: %s", worker.link.name, pause, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _detect_hangs(self) -> None:
        """Kills workers that hang. Silence is counted in ticks, so that a pause of this process is not held against them."""
        while True:
            if not any(worker.jobs for worker in self.workers):
                self.running.clear()
                await self.running.wait()
            await asyncio.sleep(TICK)
            for worker in self.workers:
                if not worker.ready or not worker.jobs:
                    worker.silent = 0.0
                    continue
                worker.silent += TICK
                if worker.silent > self._silence_limit(worker):
                    log.error("%s sent nothing for %.1f s and is killed", worker.link.name, worker.silent)
                    worker.fault, worker.silent = events.WORKER_HUNG, 0.0
                    await worker.link.kill()

    def _silence_limit(self, worker: WorkerState) -> float:
        """Returns the seconds of silence after which a worker counts as hung."""
        least = self.policy.hang_after
        if least is None:
            least = LEAST_SILENCE["cpu" if worker.facts["device"].startswith("cpu") else "gpu"]
        longest = max(
            (self.step_times.longest_silence(batch.job, len(batch.jobs)) for batch in worker.batches.values()), default=0.0
        )
        return max(HUNG_FACTOR * longest, least)

    def _receive(self, worker: WorkerState, message: Message) -> None:
        """Handles one message of a worker; ValueError for an unknown one."""
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
            raise ValueError(f"a worker sends event, free or failed, got {message['say']!r}")

    def _deliver(self, pending: PendingJob, event: events.Event) -> None:
        """Passes an event on to the job's stream."""
        if isinstance(event, events.Done | events.Failed):
            self._end(pending, event)
            return
        if isinstance(event, events.Step) and pending.worker is not None:
            for batch in pending.worker.batches.values():
                if pending in batch.jobs:
                    batch.done = event.done
        pending.stream.put_nowait(event)

    def _failed(self, pending: PendingJob, code: str, message: str) -> None:
        """Retries a job alone if other jobs shared the worker when it failed; else the job has failed."""
        if pending.cancelled:
            self._end(pending, _cancelled())
        elif pending.together:
            self._retry([pending])
        else:
            self._end(pending, events.Failed(code, message))

    def _take_back_jobs(self, worker: WorkerState) -> None:
        """Requeues the jobs of a dead worker, each to run alone, since any of them may have been the cause.

        A job whose video was only being written counts no try while others were on the device.
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
        self._retry(again)

    def _retry(self, jobs: Iterable[PendingJob]) -> None:
        """Queues jobs again, each to run alone."""
        for pending in jobs:
            assert pending.worker is not None
            pending.worker.jobs.discard(pending)
            pending.worker, pending.alone = None, True
            self.counts["retried"] += 1
            self._enqueue(pending)

    def _end(self, pending: PendingJob, event: events.Event) -> None:
        """Removes a job and delivers its last event."""
        if pending.worker is not None:
            pending.worker.jobs.discard(pending)
        pending.worker = None
        del self.pending[pending.job.id]
        pending.stream.put_nowait(event)
        pending.over.set()
        self.news.set()

    # --- scheduling

    def _enqueue(self, pending: PendingJob) -> None:
        self.waiting.add(pending)
        self.news.set()

    async def _schedule(self) -> None:
        """Assigns jobs whenever something changed or a batch delay is over."""
        pause: float | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait(), pause)
            self.news.clear()
            pause = self._assign()

    def _assign(self) -> float | None:
        """Assigns jobs to workers; returns the seconds after which to try again, None for at the next change."""
        pauses = []
        for worker in sorted(self.workers, key=lambda worker: len(worker.batches)):
            if not worker.ready:
                continue
            if worker.batches:
                jobs, pause = self.waiting.interleavable(worker), None
                self.counts["between"] += len(jobs)
            else:
                idle = sum(each.ready and not each.batches for each in self.workers)
                jobs, pause = self.waiting.next_batch(worker, idle)
            if jobs:
                self._run_on(worker, jobs)
                pause = 0.0
            if pause is not None:
                pauses.append(pause)
        return min(pauses, default=None)

    def _run_on(self, worker: WorkerState, jobs: list[PendingJob]) -> None:
        """Sends a batch to a worker."""
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
        self.running.set()
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
    return events.Failed(events.CANCELLED, "the engine is shutting down", retry=True)
