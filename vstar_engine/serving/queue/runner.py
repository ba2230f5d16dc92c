"""Runs stored jobs on the engine and returns their outcomes."""

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from typing import Any

from vstar_engine.serving.jobs import result_files
from vstar_engine.serving.jobs.events import CANCELLED, GENERATION_FAILED, Done, EngineClient, Event, Failed
from vstar_engine.serving.jobs.job import Job
from vstar_engine.serving.jobs.progress import COMPLETED, RUNNING, JobProgress, JobTracker, completed, failed
from vstar_engine.serving.settings import Settings
from vstar_engine.serving.telemetry import request_log
from vstar_engine.serving.telemetry.metrics import Metrics
from vstar_engine.serving.telemetry.tracing import JobTracer

from .errors import Stopped

log = logging.getLogger(__name__)

# seconds between two checks whether another run of the same job has ended
TURN = 0.05
# longest pause in seconds before a job whose video could not be kept is made again; it is doubled each time
LONGEST_PAUSE = 30.0


class Runner:
    """Runs jobs on an engine and reports their progress to a tracker."""

    def __init__(self, engine: EngineClient, settings: Settings, released: Callable[[str], None], metrics: Metrics):
        self.engine, self.settings, self.tracker = engine, settings, JobTracker()
        self._metrics, self._tracer = metrics, JobTracer()
        self.stopping = False
        self.running: dict[str, Job] = {}
        self.started = asyncio.Event()
        self._released = released
        self._cancelled: set[str] = set()
        # outcomes that are not recorded yet: if the store was full, the video need not be made again
        self._made: dict[str, tuple[Job, dict[str, Any]]] = {}

    async def make(self, job: Job) -> dict[str, Any]:
        """Makes a job's video and returns its outcome; Stopped if there is none to record.

        A run that was taken for lost may still be running: the later run waits for it and returns its outcome.
        """
        while job.id in self.running:
            await asyncio.sleep(TURN)
        progress = self.tracker.track(job)
        self.running[job.id] = job
        try:
            with request_log.about(job.id):
                if job.id not in self._made:
                    if progress.outcome is not None:  # cancelled after it left the queue
                        raise Stopped
                    await self._wait_for_engine()
                    self.expect(job, self._outcome(job, await self._last_event(job, progress)))
                return self._made[job.id][1]
        finally:
            del self.running[job.id]
            if job.id not in self._made:  # this run reports nothing more; the stored job is the truth
                self._stop_tracking(progress)

    def _stop_tracking(self, progress: JobProgress) -> None:
        if progress.outcome is None:
            self.tracker.discard(progress.job.id)
            progress.notify()

    async def _wait_for_engine(self) -> None:
        await self.started.wait()
        if self.stopping:
            raise Stopped

    async def _last_event(self, job: Job, progress: JobProgress) -> Done | Failed:
        since: float | None = None
        pause = self.settings.intervals.storage
        while True:
            last = await self._submit_once(job, progress)
            if self.stopping and not isinstance(last, Done):
                raise Stopped
            if job.id in self._cancelled:
                self._cancelled.discard(job.id)
                result_files.discard(self.settings.videos, job.id)
                raise Stopped
            if not isinstance(last, Failed) or not last.retry:
                return last
            since = since or time.monotonic()
            if time.monotonic() - since > self.settings.storage_wait:
                return last
            log.warning("a video could not be written (%s); the job waits for disk space", last.code)
            progress.requeue()
            await self._wait_for_space(job, pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _submit_once(self, job: Job, progress: JobProgress) -> Done | Failed:
        """Submits a job and returns its last event."""
        if self.stopping or job.id in self._cancelled:
            return Failed(CANCELLED, "the job was cancelled before it started")
        last: Event | None = None
        async for last in self.engine.submit(job):
            self._metrics.event(job, last)
            self._tracer.event(job, last)
            progress.apply(last)
        if isinstance(last, Done | Failed):
            return last
        return Failed(GENERATION_FAILED, "the engine ended the job without a result")

    async def _wait_for_space(self, job: Job, pause: float) -> None:
        """Waits `pause` seconds, and then until the disk has enough free space."""
        end = time.monotonic() + pause
        while time.monotonic() < end or shutil.disk_usage(self.settings.videos).free < self.settings.min_free:
            if self.stopping or job.id in self._cancelled:
                return
            await asyncio.sleep(self.settings.intervals.storage)

    def _outcome(self, job: Job, last: Done | Failed) -> dict[str, Any]:
        if isinstance(last, Done):
            return completed(last)
        log.warning("the job failed: %s", last.code)
        # a worker that died while writing may have left any of the files
        result_files.discard(self.settings.videos, job.id)
        return failed(last.code, last.message)

    def expect(self, job: Job, outcome: dict[str, Any]) -> None:
        """Keeps an outcome until the store has recorded it."""
        self._made[job.id] = job, outcome

    def recorded(self, id: str) -> None:
        """Publishes an expected outcome, now that the store has recorded it."""
        if id not in self._made:
            return
        job, outcome = self._made.pop(id)
        progress = self.tracker.track(job)
        if progress.outcome is None:
            progress.finish(outcome)
            self._finish(job, COMPLETED if outcome["status"] == COMPLETED else outcome["code"])

    def deleted(self, id: str) -> None:
        """Drops a job that was deleted from the store, with its files."""
        self._made.pop(id, None)
        self.tracker.discard(id)
        result_files.discard(self.settings.videos, id)

    def _finish(self, job: Job, status: str) -> None:
        self._released(job.id)
        self._metrics.finished(job, status, max(time.time() - job.created_at, 0.0))

    async def cancel(self, job: Job) -> None:
        """Stops a job that the store has recorded as cancelled."""
        self._made.pop(job.id, None)
        progress = self.tracker.track(job)
        if progress.outcome is None:
            progress.finish(failed(CANCELLED, "cancelled on request"))
            self._finish(job, CANCELLED)
        if job.id in self.running:
            self._cancelled.add(job.id)
            await self.engine.cancel(job.id)
        else:
            result_files.remove(self.settings.videos, job.id)

    async def left(self, id: str, timeout: float) -> None:
        """Waits until a cancelled job has left the engine, at most `timeout` seconds."""
        end = time.monotonic() + timeout
        while id in self.running and time.monotonic() < end:
            await asyncio.sleep(0.02)

    async def drain(self, grace: float) -> None:
        """Waits up to `grace` seconds for running jobs; all others stay in the store for the next start."""
        self.stopping = True
        for id in list(self.running):
            progress = self.tracker[id]
            if progress is None or progress.status != RUNNING:
                await self.engine.cancel(id)
        self.started.set()
        end = time.monotonic() + grace
        while self.running and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if self.running:
            log.warning("%d jobs did not end within %g s; they resume at the next start", len(self.running), grace)

    async def close(self) -> None:
        """Stops the engine."""
        with contextlib.suppress(asyncio.CancelledError):
            await self.engine.close(0.0)
