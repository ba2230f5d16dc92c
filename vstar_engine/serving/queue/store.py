"""The durable store of jobs: DBOS workflows in SQLite or Postgres."""

import asyncio
import fcntl
import logging
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dbos import DBOS, DBOSConfig, DBOSContextSetAuth, DBOSPortableJSONSerializer, SetWorkflowID, WorkflowStatus
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from vstar_engine.artifacts.files import PRIVATE
from vstar_engine.serving.jobs import clock
from vstar_engine.serving.jobs.job import Job
from vstar_engine.serving.jobs.progress import FAILED
from vstar_engine.serving.jobs.result_files import UNKNOWN
from vstar_engine.serving.settings import Settings

from . import dbos_patches
from .errors import UNAVAILABLE, StoreError
from .queue_worker import QueueWorker
from .sqlite import Connection, Disk, prepare
from .stored_job import (
    FINISHED,
    UNFINISHED,
    StoredJob,
    application_version,
    end_of,
    outcome_of,
    stored_job_from,
)
from .workflow import WORKFLOW, StoreCallbacks, Workflow, register

log = logging.getLogger(__name__)

QUEUE = "videos"
# seconds between two notices of events and streams in Postgres, which are not used here; DBOS's own default is 0.01
NOTICE_INTERVAL = 1.0
MIDDLE_PRIORITY = 1000

# number of deleted jobs whose cursor is kept, for clients whose next page begins there
DELETED_KEPT = 10_000
# the position of a job in the list: milliseconds, its own time of creation, id
PageCursor = tuple[int, float, str]


class JobStore:
    """Accepted jobs and their outcomes, durable once `add` returned. Jobs of another model wait for a server of that model."""

    def __init__(self, settings: Settings, model: str):
        self.settings, self.takes = settings, application_version(model)
        self._lock: int | None = None
        self._disk: Disk | None = None
        self._callbacks: StoreCallbacks | None = None
        self._run: Workflow | None = None
        self._reports: set[asyncio.Task[None]] = set()
        self._system: Any = None  # DBOS's system database
        self._queue: QueueWorker | None = None
        self._deleted: dict[str, tuple[str, PageCursor]] = {}  # id -> its owner and cursor

    @property
    def at_work(self) -> int:
        """Returns how many jobs the engine holds at most: two batches, so that it can choose what to batch and interleave."""
        return 2 * self.settings.max_batch

    @property
    def alone(self) -> bool:
        """Returns whether no other server can use this database."""
        return self._disk is not None

    def open(self) -> None:
        """Creates and locks the data folder and checks the database; StoreError if either is unusable."""
        for folder in (self.settings.data, self.settings.videos):
            folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        self._claim_folder()
        if (path := sqlite_path(self.settings.database_url)) is not None:
            try:
                prepare(path)
                self._disk = Disk(path)
            except (sqlite3.Error, OSError) as error:
                kept = self.settings.videos / UNKNOWN
                hint = f"if {path} is damaged, move it away: the list of jobs then starts empty, and videos are kept in {kept}"
                raise StoreError(f"the database of jobs cannot be opened: {error}; {hint}") from error

    async def start(self, callbacks: StoreCallbacks, waiting: Callable[[], bool]) -> None:
        """Connects to the database and resumes unfinished jobs; StoreError if it cannot be used.

        `waiting` returns whether jobs are known to wait for a run.
        """
        intervals = self.settings.intervals
        self._callbacks, self._run = callbacks, register(callbacks)
        dbos_patches.refuse_pickle()
        engine: dict[str, Any] = {"hide_parameters": True}  # otherwise errors show the statement's parameters, and so prompts
        config = DBOSConfig(
            name="vstar-engine",
            system_database_url=self.settings.database_url,
            executor_id=self.settings.instance,
            application_version=self.takes,
            serializer=DBOSPortableJSONSerializer(),
            log_level="ERROR",
            notification_coalesce_sec=NOTICE_INTERVAL,
            db_engine_kwargs={**engine, "connect_args": {"factory": Connection}} if self.alone else engine,
        )
        try:
            dbos_patches.stop_polling()
            dbos = DBOS(config=config)
            with dbos_patches.quiet_launch():
                DBOS.launch()
            self._system = dbos._sys_db
            dbos_patches.retry_outcome_writes(self._system, lambda: callbacks.stopping, intervals.outcome_retry)
            dbos_patches.report_outcomes(self._system, self._report_soon)
            queue = await DBOS.register_queue_async(
                QUEUE, worker_concurrency=self.at_work, polling_interval_sec=intervals.queue_poll, on_conflict="always_update"
            )
            self._queue = QueueWorker(dbos, queue, waiting, self.alone, intervals)
        except DBAPIError as error:
            raise StoreError(f"the database of jobs cannot be used: {str(error.orig).splitlines()[0]}") from error

    def _report_soon(self, id: str, landed: bool) -> None:
        task = asyncio.create_task(self._report(id, landed))
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    async def _report(self, id: str, landed: bool) -> None:
        """Reports an outcome once it is on the disk, or that the job was cancelled or deleted before."""
        callbacks = self._callbacks
        assert callbacks is not None
        while True:
            try:
                await self._sync()
                stored = None if landed else await self.get(id)
                break
            except UNAVAILABLE as error:
                if callbacks.stopping:
                    return
                log.warning("an outcome cannot be confirmed on the disk yet: %s", type(error).__name__)
            await asyncio.sleep(self.settings.intervals.outcome_retry)
        if landed:
            callbacks.recorded(id)
        elif stored is None:
            callbacks.deleted(id)
        elif stored.outcome is not None and stored.outcome["status"] == FAILED:
            await callbacks.cancel(stored.job)

    def _claim_folder(self) -> None:
        """Locks the data folder against a second server."""
        self._lock = os.open(self.settings.data / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"another server uses {self.settings.data}; choose another folder with --data") from error

    async def stop(self) -> None:
        """Disconnects from the database; unfinished jobs resume at the next start."""
        if self._queue is not None:
            await asyncio.to_thread(self._queue.stop)
        await asyncio.to_thread(DBOS.destroy, destroy_registry=True, workflow_completion_timeout_sec=0)

    def close(self) -> None:
        """Unlocks the data folder."""
        if self._disk is not None:
            self._disk.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def wake_queue(self) -> None:
        """Starts waiting jobs now, as far as there is room, rather than at the next poll."""
        if self._queue is not None:
            self._queue.wake()

    async def add(self, job: Job, at_once: bool) -> None:
        """Stores a job, to run from the queue or `at_once`. A job whose id is already stored is not changed."""
        if at_once:
            assert self._run is not None
            with SetWorkflowID(job.id), DBOSContextSetAuth(job.key_id, None):
                await DBOS.start_workflow_async(self._run, job.to_json())
        else:
            await DBOS.enqueue_workflow_with_options_async(
                {
                    "workflow_name": WORKFLOW,
                    "queue_name": QUEUE,
                    "workflow_id": job.id,
                    "app_version": self.takes,
                    "priority": MIDDLE_PRIORITY - job.priority,
                    "authenticated_user": job.key_id,
                },
                job.to_json(),
            )
            self.wake_queue()
        await self._sync()

    async def _sync(self) -> None:
        if self._disk is not None:
            await self._disk.sync()

    async def get(self, id: str) -> StoredJob | None:
        found = await DBOS.list_workflows_async(workflow_ids=[id], name=WORKFLOW)
        return stored_job_from(found[0]) if found else None

    async def cursor(self, owner: str, id: str) -> PageCursor | None:
        """Returns the cursor of an owner's job, also of one deleted lately; None if there is none."""
        stored = await self.get(id)
        whose, cursor = self._deleted.get(id, ("", None)) if stored is None else (stored.job.key_id, _cursor_of(stored))
        return cursor if whose == owner else None

    async def page(self, owner: str, after: PageCursor | None, limit: int, newest_first: bool) -> tuple[list[StoredJob], bool]:
        """Returns up to `limit` jobs of an owner that come after a cursor, and whether there are more."""
        bounds: dict[str, Any] = {} if after is None else {"end_time" if newest_first else "start_time": _moment(after[0])}
        wanted, fetched = limit + 1, limit + 17
        while True:
            found = await DBOS.list_workflows_async(name=WORKFLOW, user=owner, limit=fetched, sort_desc=newest_first, **bounds)
            stored_jobs = [stored_job_from(status) for status in found]
            whole = len(stored_jobs) < fetched
            if not whole:  # more jobs of the last millisecond may follow behind the limit
                stored_jobs = [stored for stored in stored_jobs if stored.created != stored_jobs[-1].created]
            stored_jobs.sort(key=_cursor_of, reverse=newest_first)
            if after is not None:
                stored_jobs = [r for r in stored_jobs if (_cursor_of(r) < after if newest_first else _cursor_of(r) > after)]
            if whole or len(stored_jobs) >= wanted:
                return stored_jobs[:limit], len(stored_jobs) > limit
            fetched *= 2

    async def since(self, owner: str, seconds: float) -> list[StoredJob]:
        """Returns an owner's jobs of the last `seconds`."""
        begin = clock.now() - seconds
        found = await DBOS.list_workflows_async(name=WORKFLOW, user=owner, start_time=_moment(int(begin * 1000)))
        return [stored_job_from(status) for status in found]

    async def unfinished(self) -> dict[str, str]:
        """Returns the owners of the unfinished jobs that this server may run, by id."""
        found = await self._unfinished(app_version=self.takes)
        return {status.workflow_id: status.authenticated_user or "" for status in found}

    async def foreign(self) -> Counter[str]:
        """Returns the number of unfinished jobs of other models or versions, by their `application_version`."""
        return Counter(status.app_version or "" for status in await self._unfinished() if status.app_version != self.takes)

    async def claimed(self) -> set[str]:
        """Returns the ids of the jobs that run on this server according to the database."""
        found = await self._unfinished(status="PENDING", app_version=self.takes, executor_id=self.settings.instance)
        return {status.workflow_id for status in found}

    async def _unfinished(self, status: str | list[str] = UNFINISHED, **which: Any) -> list[WorkflowStatus]:
        return await DBOS.list_workflows_async(name=WORKFLOW, status=status, load_input=False, load_output=False, **which)

    async def resume(self, ids: Sequence[str]) -> None:
        """Queues jobs again whose run here ended without an outcome. Jobs cancelled meanwhile stay cancelled."""
        for id in ids:
            await asyncio.to_thread(self._system.reenqueue_for_recovery, id, [self.settings.instance], QUEUE)
        self.wake_queue()

    async def cancel(self, id: str) -> None:
        """Records a job as cancelled, unless it has ended."""
        await DBOS.cancel_workflow_async(id)
        await self._sync()

    async def delete(self, ids: Sequence[str]) -> None:
        for status in await DBOS.list_workflows_async(workflow_ids=list(ids), name=WORKFLOW, load_output=False):
            content = status.input["args"][0] if status.input else {}
            cursor = status.created_at or 0, content.get("created_at", 0.0), status.workflow_id
            self._deleted[status.workflow_id] = status.authenticated_user or "", cursor
        while len(self._deleted) > DELETED_KEPT:
            del self._deleted[next(iter(self._deleted))]
        await DBOS.delete_workflows_async(list(ids))
        await self._sync()

    async def known(self, ids: Sequence[str]) -> dict[str, bool]:
        """Returns the stored ones of these ids, each with whether it has a video or may still get one."""
        found = await DBOS.list_workflows_async(workflow_ids=list(ids), load_input=False)
        outcomes = {status.workflow_id: outcome_of(status) for status in found}
        return {id: outcome is None or outcome["status"] != FAILED for id, outcome in outcomes.items()}

    async def ended(self, before: float | None = None, limit: int = 100) -> list[str]:
        """Returns the ids of jobs that ended, the oldest first; only those that ended `before` a time, if given."""
        bounds: dict[str, Any] = {} if before is None else {"completed_before": _moment(int(before * 1000))}
        passed = 0
        while True:
            found = await DBOS.list_workflows_async(
                name=WORKFLOW,
                status=FINISHED,
                limit=limit,
                offset=passed,
                load_input=False,
                load_output=before is not None,
                **bounds,
            )
            # the database's clock may have been slow when the job ended
            ids = [status.workflow_id for status in found if before is None or end_of(status) <= before]
            if ids or len(found) < limit:
                return ids
            passed += limit


def sqlite_path(url: str) -> Path | None:
    """Returns the file of an SQLite URL; None for another database. StoreError for an invalid URL."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise StoreError("the database is a URL such as sqlite:///jobs.sqlite or postgresql://user@host/name") from error
    if parsed.get_backend_name() != "sqlite":
        return None
    if not parsed.database or parsed.database == ":memory:":
        raise StoreError("jobs are kept in a file or on a server: give sqlite:///jobs.sqlite or postgresql://user@host/name")
    return Path(parsed.database)


def _moment(milliseconds: int) -> str:
    # plus half a millisecond: DBOS reads it as a float and truncates to milliseconds
    return datetime.fromtimestamp((milliseconds + 0.5) / 1000, UTC).isoformat()


def _cursor_of(stored: StoredJob) -> PageCursor:
    # with Python below 3.12 DBOS stores whole seconds in SQLite
    return stored.created, stored.job.created_at, stored.job.id
