"""The service behind the routes: accepts each job once, returns its state, and resumes lost jobs."""

import asyncio
import contextlib
import errno
import hashlib
import logging
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

from vstar_engine.errors import VstarError
from vstar_engine.serving.errors import FINAL, SERVER, ApiError, not_found
from vstar_engine.serving.jobs.events import EngineClient
from vstar_engine.serving.jobs.job import ID, Job
from vstar_engine.serving.jobs.progress import FAILED, RUNNING
from vstar_engine.serving.queue import retention
from vstar_engine.serving.queue.admission import Admission
from vstar_engine.serving.queue.errors import UNAVAILABLE
from vstar_engine.serving.queue.runner import Runner
from vstar_engine.serving.queue.sqlite import DiskError
from vstar_engine.serving.queue.store import JobStore, PageCursor
from vstar_engine.serving.queue.stored_job import StoredJob
from vstar_engine.serving.settings import Settings
from vstar_engine.serving.telemetry.metrics import Metrics

from .request_to_job import Resolver, fingerprint, remixed
from .schema import CreateVideo, RemixVideo, VideoObject, VideoSettings
from .video_object import video

log = logging.getLogger(__name__)

# seconds within which an identical request that the client marks as a retry is the same request
REPEATED = 60.0
DELETE_WAIT = 30.0


def unwritable(error: Exception) -> ApiError:
    """Returns the error for a database that is UNAVAILABLE: 507 if the disk is full, else 503."""
    again = {"Retry-After": "5"}
    full = error.errno == errno.ENOSPC if isinstance(error, DiskError) else "full" in str(getattr(error, "orig", ""))
    if full:
        return ApiError(507, "storage_full", "the disk is full: the job cannot be stored", None, SERVER, again)
    return ApiError(503, "store_unavailable", "the database of jobs does not answer", None, SERVER, again)


@dataclass(frozen=True)
class Caller:
    """Who sends a request, with its idempotency key and its number of retries."""

    owner: str
    idempotency_key: str | None = None
    retries: int = 0


class Service:
    """Everything behind the routes: admission, store, runner, background tasks."""

    def __init__(self, settings: Settings, engine: EngineClient, resolver: Resolver, runner: type[Runner] = Runner):
        self.settings, self.engine, self.resolver = settings, engine, resolver
        self.admission = Admission(settings)
        self.store = JobStore(settings, resolver.spec.name)
        self.metrics = Metrics()
        self.runner = runner(engine, settings, self.admission.release, self.metrics)
        self.failure: VstarError | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.streams, self.over = 0, False
        self._recent: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()
        # locks of jobs that are being accepted or withdrawn, each kept while it is held or awaited
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: list[asyncio.Task[None]] = []
        self._lost: dict[str, float] = {}

    async def start(self) -> None:
        """Connects the store, which must be open, and starts the engine in the background."""
        self._watch()
        await self.store.start(self.runner, lambda: len(self.admission) > len(self.runner.running))
        unfinished = await self.store.unfinished()
        self.admission.restore(unfinished)
        self.store.wake_queue()
        self.metrics.recovered(len(unfinished))
        for takes, count in (await self.store.foreign()).items():
            log.warning(
                "%d jobs wait for a server of the version and model that accepted them (%s): start it, or cancel them",
                count,
                takes,
            )
        self._tasks = [asyncio.create_task(work()) for work in (self._run_engine, self._watchdog, self._sweeper)]
        for task in self._tasks:
            task.add_done_callback(self._task_failed)

    def _watch(self) -> None:
        tracker, videos = self.runner.tracker, self.settings.videos

        def counted(name: str) -> Callable[[], float]:
            return lambda: self.engine.facts()["counters"][name]

        self.metrics.watch(
            worker_restarts=counted("restarts"),
            embedding_cache_bytes=counted("cache_bytes"),
            embedding_cache_hits=counted("cache_hits"),
            embedding_cache_misses=counted("cache_misses"),
            queued_jobs=lambda: len(self.admission) - tracker.count(RUNNING),
            running_jobs=lambda: tracker.count(RUNNING),
            queue_limit=lambda: self.settings.max_queue,
            ready=lambda: float(self.ready),
            draining=lambda: float(self.admission.draining),
            disk_free_bytes=lambda: shutil.disk_usage(videos).free,
            stored_bytes=lambda: retention.stored(videos),
            event_streams=lambda: self.streams,
        )

    def _task_failed(self, task: "asyncio.Task[None]") -> None:
        """Stops the server after a background task failed."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, VstarError):
            log.error("the engine cannot start: %s", error)
            self.failure = error
        else:
            log.critical("a background task failed", exc_info=error)
            self.failure = VstarError(f"a background task of the server failed, see its log: {type(error).__name__}: {error}")
        self.on_failure()

    async def _run_engine(self) -> None:
        await self.engine.start()
        log.info("ready: %s", self.engine.facts())
        self.runner.started.set()
        await self.engine.run()

    @property
    def ready(self) -> bool:
        """Returns whether the engine is warm and jobs are accepted."""
        return self.runner.started.is_set() and self.engine.ready and not self.admission.draining

    async def close(self) -> None:
        """Stops the service; unfinished jobs stay in the store."""
        self.admission.draining = self.runner.stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.runner.close()
        await self.store.stop()

    async def drain(self) -> None:
        """Accepts no more jobs and waits for the running ones, at most `grace` seconds."""
        self.admission.draining = True
        await self.runner.drain(self.settings.grace)
        self.over = True

    async def create(self, caller: Caller, body: CreateVideo) -> StoredJob:
        """Accepts a video, or returns that of the same request sent before."""
        return await self._accept(caller, body, body.prompt, fingerprint("create", body), None)

    async def remix(self, caller: Caller, id: str, body: RemixVideo) -> StoredJob:
        """Accepts a video with the settings of an existing one."""
        stored = await self.get(caller.owner, id)
        if not stored.ours:
            message = "this video was accepted by another version of vstar-engine, so this version cannot remix it"
            raise ApiError(409, "other_version", message, "video_id", headers=FINAL)
        source = stored.job
        said = fingerprint(f"remix {id}", body)
        return await self._accept(caller, remixed(source, body, body.prompt), body.prompt, said, source.id)

    async def _accept(
        self, caller: Caller, body: VideoSettings, prompt: str | None, said: str, source: str | None
    ) -> StoredJob:
        id = self._id_of(caller) or await self._repeated(caller, said)
        job = self.resolver.plain(body, prompt, caller.owner, said, id)
        self.admission.check_budget(job)
        self._remember(caller, said, job.id)
        job = replace(job, remixed_from=source)
        lock = self._locks.setdefault(job.id, asyncio.Lock())
        try:
            async with lock:
                if id is not None and (known := await self._known(job)) is not None:
                    return known
                self.admission.check_open()
                return await self._enqueue(job, body)
        except UNAVAILABLE as error:
            raise unwritable(error) from error

    async def _enqueue(self, job: Job, body: VideoSettings) -> StoredJob:
        with contextlib.ExitStack() as undo:
            if self.admission.reserve(job.id, job.key_id):
                # a failed write may still have reached the database; the watchdog then counts the job again
                undo.callback(self.admission.give_back, job.id)
            job = await self.resolver.with_states(job, body)
            # with no job before it this one need not wait for the queue's poll
            idle = len(self.admission) - 1 <= len(self.runner.running) < self.store.at_work
            await self.store.add(job, at_once=idle)
            undo.pop_all()
        self.admission.settle(job.id)
        self.runner.tracker.track(job)
        self.metrics.accepted()
        return StoredJob(job, int(job.created_at * 1000), new=True)

    def _remember(self, caller: Caller, said: str, id: str) -> None:
        """Keeps a request's job id for as long as the client may retry it."""
        now = time.monotonic()
        self._recent[caller.owner, said] = (id, now)
        self._recent.move_to_end((caller.owner, said))
        while now - next(iter(self._recent.values()))[1] > REPEATED:
            self._recent.popitem(last=False)

    def _id_of(self, caller: Caller) -> str | None:
        if caller.idempotency_key is None:
            return None
        digest = hashlib.sha256(f"{caller.owner}\0{caller.idempotency_key}".encode()).hexdigest()
        return f"video_{digest[:32]}"

    async def _repeated(self, caller: Caller, said: str) -> str | None:
        """Returns the job id of a request's first try, if this one is a retry."""
        if not caller.retries:
            return None
        id, since = self._recent.get((caller.owner, said), ("", 0.0))
        if id and time.monotonic() - since <= REPEATED:
            return id
        # the first try may have reached a server that crashed since
        found = [r.job.id for r in await self.store.since(caller.owner, REPEATED) if r.job.fingerprint == said]
        return found[-1] if found else None

    async def _known(self, job: Job) -> StoredJob | None:
        stored = await self.store.get(job.id)
        if stored is None:
            return None
        if stored.job.fingerprint != job.fingerprint or stored.job.key_id != job.key_id:
            message = "this Idempotency-Key was used with another body"
            raise ApiError(409, "idempotency_key_reused", message, None, headers=FINAL)
        return stored

    async def get(self, owner: str, id: str) -> StoredJob:
        """Returns an owner's job; ApiError if it does not exist or belongs to another owner."""
        stored = self._tracked(id) or (await self.store.get(id) if ID.fullmatch(id) else None)
        if stored is None or stored.job.key_id != owner:
            raise not_found(id)
        return stored

    async def cursor(self, owner: str, id: str) -> PageCursor:
        """Returns the page cursor of an owner's job; ApiError if there is none."""
        cursor = await self.store.cursor(owner, id) if ID.fullmatch(id) else None
        if cursor is None:
            raise not_found(id)
        return cursor

    def _tracked(self, id: str) -> StoredJob | None:
        """Returns a tracked job, unless another server could know more of it."""
        progress = self.runner.tracker[id] if self.store.alone else None
        return StoredJob(progress.job, 0, progress.outcome) if progress else None

    def show(self, stored: StoredJob) -> VideoObject:
        """Returns the API's object of a job."""
        elsewhere = stored.taken_by not in (None, self.settings.instance)
        return video(stored, self.runner.tracker[stored.job.id], self.settings.keep_for, elsewhere)

    async def cancel(self, owner: str, id: str) -> StoredJob:
        """Cancels a job; one that has ended is not changed."""
        stored = await self.get(owner, id)
        if stored.outcome is None and self._outcome_of(id) is None:
            await self.store.cancel(id)
            known = await self.store.get(id)
            if known is not None and known.ours and known.outcome is not None and known.outcome["status"] == FAILED:
                await self.runner.cancel(known.job)
            return known or stored
        return stored

    def _outcome_of(self, id: str) -> dict[str, Any] | None:
        progress = self.runner.tracker[id]
        return progress.outcome if progress else None

    async def delete(self, owner: str, id: str) -> None:
        """Cancels a job and deletes it with its files."""
        stored = await self.cancel(owner, id)
        await self.runner.left(id, DELETE_WAIT)
        await retention.delete(self.store, self.settings.videos, [id])
        self.runner.tracker.discard(stored.job.id)

    async def withdraw(self, owner: str, id: str) -> None:
        """Deletes a job whose client disconnected before the response; the same request then creates it again."""
        async with self._locks.setdefault(id, asyncio.Lock()):
            await self.delete(owner, id)

    async def ended(self, stored: StoredJob, timeout: float) -> StoredJob:
        """Waits for a job's end, at most `timeout` seconds; returns its latest state."""
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            progress = self.runner.tracker[stored.job.id]
            if progress is not None and progress.outcome is not None:
                return StoredJob(stored.job, stored.created, progress.outcome)
            if progress is None:
                await asyncio.sleep(min(left, 0.5))
            else:
                await progress.wait_for_change(progress.version, min(left, self.settings.intervals.watchdog))
            if progress is None or progress.outcome is None:
                stored = await self.store.get(stored.job.id) or stored
            if stored.outcome is not None:
                return stored
        return stored

    async def _watchdog(self) -> None:
        """Resumes jobs that lost their run, and stops runs whose job another server cancelled."""
        intervals, last = self.settings.intervals, 0.0
        while True:
            await asyncio.sleep(intervals.watchdog)
            try:
                await self._check_runs()
                if time.monotonic() - last > intervals.reconcile:
                    last = time.monotonic()
                    unfinished = await self.store.unfinished()
                    self.admission.reconcile(unfinished)
                    if found := {id: owner for id, owner in unfinished.items() if id not in self.admission}:
                        self.admission.restore(found)
                        self.store.wake_queue()
            except UNAVAILABLE as error:
                log.warning("the database of jobs is unavailable: %s, %s", unwritable(error).code, type(error).__name__)
            self.runner.tracker.drop_finished()

    async def _check_runs(self) -> None:
        now = time.monotonic()
        running = set(self.runner.running)
        claimed = await self.store.claimed()
        odd = (claimed - running - set(self.runner.running)) | {id for id in running - claimed if id in self.runner.running}
        self._lost = {id: self._lost.get(id, now) for id in odd}
        lost = [id for id, since in self._lost.items() if now - since >= self.settings.intervals.lost_after]
        if (resumed := [id for id in lost if id in claimed]) and not self.runner.stopping:
            log.warning("resuming %d jobs that had lost their run", len(resumed))
            await self.store.resume(resumed)
        for id in (id for id in lost if id not in claimed and id in self.runner.running):
            known = await self.store.get(id)
            # a job that is queued again has only lost its claim
            gone = known is None or (known.outcome is not None and known.outcome["status"] == FAILED)
            if gone and (job := self.runner.running.get(id)) is not None:
                await self.runner.cancel(job)
        for id in lost:
            del self._lost[id]

    async def _sweeper(self) -> None:
        while True:
            try:
                await retention.sweep(self.store, self.settings, self.runner.tracker.discard)
            except (*UNAVAILABLE, OSError) as error:
                log.warning("the sweep failed: %s", type(error).__name__)
            await asyncio.sleep(self.settings.intervals.sweep)
