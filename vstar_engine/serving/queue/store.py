"""Jobs that outlive the process: DBOS workflows in SQLite or Postgres, behind one small class."""

import asyncio
import contextvars
import fcntl
import functools
import logging
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from dbos import DBOS, DBOSConfig, DBOSContextSetAuth, DBOSPortableJSONSerializer, SetWorkflowID, WorkflowStatus
from dbos._error import DBOSQueryTimeoutError
from dbos._serialization import DBOSDefaultSerializer
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnection

from vstar_engine.artifacts.files import PRIVATE
from vstar_engine.errors import VstarError
from vstar_engine.serving.jobs import clock
from vstar_engine.serving.jobs.job import Job
from vstar_engine.serving.jobs.progress import FAILED
from vstar_engine.serving.jobs.result_files import UNKNOWN
from vstar_engine.serving.settings import Settings

from .queue_worker import LOOK, QueueWorker, calm
from .runner import Runner, Stopped
from .sqlite import Connection, Disk, DiskError, prepare
from .stored_job import FINISHED, MOST_RECOVERIES, UNFINISHED, Record, application_version, end_of, outcome_of, record_of

log = logging.getLogger(__name__)

QUEUE, WORKFLOW = "videos", "generate"
# seconds between two times that DBOS tells others of events and streams in Postgres, of which there are none; it would be 0.01
SELDOM_TOLD = 1.0
# what DBOS writes of a job's end, and the seconds between two tries where that cannot be written
OUTCOMES = ("record_operation_result", "update_workflow_outcome")
PAUSE = 1.0
MIDDLE_PRIORITY = 1000
# a database that cannot be used now: it is full, gone, locked, slow, or only to be read since another took its place
UNAVAILABLE = (DBAPIError, NoConnection, DBOSQueryTimeoutError, DiskError)

# deleted jobs whose place in the list is remembered, for clients whose next page begins there
GONE = 10_000
# where a job stands in the list
Place = tuple[int, float, str]

_runner: Runner | None = None
Answer = TypeVar("Answer")


class StoreError(VstarError, RuntimeError):
    """The database of jobs cannot be opened."""

    exit_code = 4


def _refuse_pickle(text: str) -> Any:
    raise TypeError("the database holds a pickled value, which would run code: it was not written by this server")


def _the_runner() -> Runner:
    assert _runner is not None
    return _runner


@DBOS.step(name="make")
async def _make(content: dict[str, Any]) -> dict[str, Any]:
    return await _the_runner().make(Job.from_json(content))


@DBOS.workflow(name=WORKFLOW, max_recovery_attempts=MOST_RECOVERIES)
async def _generate(content: dict[str, Any]) -> dict[str, Any]:
    try:
        outcome = await _make(content)
    except UNAVAILABLE as error:
        # the job stays pending; the watchdog takes it up when the database can be written again
        log.warning("an outcome could not be recorded: %s", type(error).__name__)
        raise Stopped from error
    _the_runner().expect(Job.from_json(content), outcome)
    return outcome


def patient(write: Callable[..., Answer]) -> Callable[..., Answer]:
    """Makes a write wait until the database can be written; Stopped where the server ends before.

    DBOS would take a failure to write a job's outcome for the job's own, and write that down as soon as it can.
    """

    @functools.wraps(write)
    def until_written(*args: Any, **settings: Any) -> Answer:
        told = False
        while True:
            try:
                return write(*args, **settings)
            except UNAVAILABLE as error:
                if _the_runner().stopping:
                    raise Stopped from error
                if not told:
                    log.warning("an outcome cannot be recorded yet: %s", type(error).__name__)
            told = True
            time.sleep(PAUSE)

    return until_written


class JobStore:
    """Accepted jobs and their outcomes. What `add` has returned is never lost. Those of another model wait for its server."""

    def __init__(self, settings: Settings, model: str):
        self.settings, self.takes = settings, application_version(model)
        self._lock: int | None = None
        self._disk: Disk | None = None
        self._telling: set[asyncio.Task[None]] = set()
        self._system: Any = None  # what DBOS writes through
        self._queue: QueueWorker | None = None
        self._gone: dict[str, tuple[str, Place]] = {}  # id -> its owner and place

    @property
    def at_work(self) -> int:
        """Returns how many jobs are with the engine at most, so that it can choose what rides together and goes between."""
        return 2 * self.settings.max_batch

    @property
    def alone(self) -> bool:
        """Returns whether no other server can write to this database."""
        return self._disk is not None

    def open(self) -> None:
        """Makes the folder and keeps others out of it; StoreError where it or its database cannot be used."""
        for folder in (self.settings.data, self.settings.videos):
            folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        self._claim_folder()
        if (path := sqlite_path(self.settings.database_url)) is not None:
            try:
                prepare(path)
                self._disk = Disk(path)
            except (sqlite3.Error, OSError) as error:
                kept = self.settings.videos / UNKNOWN
                hint = f"if {path} is damaged, move it away: the list of jobs starts anew, and videos are kept in {kept}"
                raise StoreError(f"the database of jobs cannot be opened: {error}; {hint}") from error

    async def start(self, runner: Runner, waiting: Callable[[], bool]) -> None:
        """Connects to the database and takes unfinished jobs up; StoreError where it cannot be used.

        `waiting` says whether jobs are known that nobody has begun.
        """
        global _runner
        _runner = runner
        DBOSDefaultSerializer.deserialize = _refuse_pickle  # type: ignore[method-assign, assignment]
        engine: dict[str, Any] = {"hide_parameters": True}  # errors of statements would otherwise show the prompts in them
        config = DBOSConfig(
            name="vstar-engine",
            system_database_url=self.settings.database_url,
            executor_id=self.settings.instance,
            application_version=self.takes,
            serializer=DBOSPortableJSONSerializer(),
            log_level="ERROR",
            notification_coalesce_sec=SELDOM_TOLD,
            db_engine_kwargs={**engine, "connect_args": {"factory": Connection}} if self.alone else engine,
        )
        try:
            calm()
            dbos = DBOS(config=config)
            its = logging.getLogger("dbos")
            its.handlers.clear()
            its.propagate, its.disabled = True, True  # it would log the traceback of what is answered below
            DBOS.launch()
            its.disabled = False
            self._system = dbos._sys_db
            for name in OUTCOMES:
                setattr(self._system, name, patient(getattr(self._system, name)))
            self._system.update_workflow_outcome = self._told(self._system.update_workflow_outcome)
            queue = await DBOS.register_queue_async(
                QUEUE, worker_concurrency=self.at_work, polling_interval_sec=LOOK, on_conflict="always_update"
            )
            self._queue = QueueWorker(dbos, queue, waiting, self.alone)
        except DBAPIError as error:
            raise StoreError(f"the database of jobs cannot be used: {str(error.orig).splitlines()[0]}") from error

    def _told(self, write: Callable[..., bool]) -> Callable[..., bool]:
        """Makes the write that ends a job tell the runner, who publishes an end only when it is there for good."""
        loop = asyncio.get_running_loop()

        @functools.wraps(write)
        def then_tell(id: str, status: str, **values: Any) -> bool:
            landed = write(id, status, **values)
            if status == "SUCCESS" and not loop.is_closed():
                # outside the workflow, which is over: in its context DBOS would take a look into the database for a step of it
                loop.call_soon_threadsafe(self._tell_soon, id, landed, context=contextvars.Context())
            return landed

        return then_tell

    def _tell_soon(self, id: str, landed: bool) -> None:
        task = asyncio.create_task(self._tell(id, landed))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _tell(self, id: str, landed: bool) -> None:
        """Has an end published once it is on the disk, or undone where the job was cancelled or deleted before."""
        runner = _the_runner()
        while True:
            try:
                await self._sync()
                record = None if landed else await self.get(id)
                break
            except UNAVAILABLE as error:
                if runner.stopping:
                    return
                log.warning("an outcome cannot be made sure of yet: %s", type(error).__name__)
            await asyncio.sleep(PAUSE)
        if landed:
            runner.recorded(id)
        elif record is None:
            runner.deleted(id)
        elif record.outcome is not None and record.outcome["status"] == FAILED:
            await runner.cancel(record.job)

    def _claim_folder(self) -> None:
        """Keeps a second server out of the folder of data."""
        self._lock = os.open(self.settings.data / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"another server uses {self.settings.data}; give --data another folder") from error

    async def stop(self) -> None:
        """Leaves the database; what has not ended is taken up at the next start."""
        if self._queue is not None:
            await asyncio.to_thread(self._queue.stop)
        await asyncio.to_thread(DBOS.destroy, workflow_completion_timeout_sec=0)

    def close(self) -> None:
        """Lets others into the folder."""
        if self._disk is not None:
            self._disk.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def look(self) -> None:
        """Has jobs that wait taken now, as far as there is room, instead of at the queue's next look."""
        if self._queue is not None:
            self._queue.ring()

    async def add(self, job: Job, at_once: bool) -> None:
        """Writes a job down, to run in its turn or `at_once`. An id that is there already stays what it is."""
        if at_once:
            with SetWorkflowID(job.id), DBOSContextSetAuth(job.key_id, None):
                await DBOS.start_workflow_async(_generate, job.to_json())
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
            self.look()
        await self._sync()

    async def _sync(self) -> None:
        if self._disk is not None:
            await self._disk.sync()

    async def get(self, id: str) -> Record | None:
        found = await DBOS.list_workflows_async(workflow_ids=[id], name=WORKFLOW)
        return record_of(found[0]) if found else None

    async def place(self, owner: str, id: str) -> Place | None:
        """Returns where an owner's job stands in the list, or stood before it was deleted."""
        record = await self.get(id)
        whose, place = self._gone.get(id, ("", None)) if record is None else (record.job.key_id, _order(record))
        return place if whose == owner else None

    async def page(self, owner: str, after: Place | None, limit: int, newest_first: bool) -> tuple[list[Record], bool]:
        """Returns up to `limit` jobs of an owner that come after a place, and whether there are more."""
        edge: dict[str, Any] = {} if after is None else {"end_time" if newest_first else "start_time": _moment(after[0])}
        wanted, fetched = limit + 1, limit + 17
        while True:
            found = await DBOS.list_workflows_async(name=WORKFLOW, user=owner, limit=fetched, sort_desc=newest_first, **edge)
            records = [record_of(status) for status in found]
            whole = len(records) < fetched
            if not whole:  # the last millisecond may go on behind the limit
                records = [record for record in records if record.created != records[-1].created]
            records.sort(key=_order, reverse=newest_first)
            if after is not None:
                records = [r for r in records if (_order(r) < after if newest_first else _order(r) > after)]
            if whole or len(records) >= wanted:
                return records[:limit], len(records) > limit
            fetched *= 2

    async def since(self, owner: str, seconds: float) -> list[Record]:
        """Returns an owner's jobs of the last seconds."""
        begin = clock.now() - seconds
        found = await DBOS.list_workflows_async(name=WORKFLOW, user=owner, start_time=_moment(int(begin * 1000)))
        return [record_of(status) for status in found]

    async def unfinished(self) -> dict[str, str]:
        """Returns the owner of every job without an outcome that this server may run, by id."""
        found = await self._unfinished(app_version=self.takes)
        return {status.workflow_id: status.authenticated_user or "" for status in found}

    async def foreign(self) -> Counter[str]:
        """Counts the jobs that wait for a server of another model or version of `Job`, by what that server takes."""
        return Counter(status.app_version or "" for status in await self._unfinished() if status.app_version != self.takes)

    async def claimed(self) -> set[str]:
        """Returns the ids of the jobs that the database says run here."""
        found = await self._unfinished(status="PENDING", app_version=self.takes, executor_id=self.settings.instance)
        return {status.workflow_id for status in found}

    async def _unfinished(self, status: str | list[str] = UNFINISHED, **which: Any) -> list[WorkflowStatus]:
        return await DBOS.list_workflows_async(name=WORKFLOW, status=status, load_input=False, load_output=False, **which)

    async def resume(self, ids: Sequence[str]) -> None:
        """Puts jobs back into the queue, whose run here ended without an outcome. One that was cancelled meanwhile stays so."""
        for id in ids:
            await asyncio.to_thread(self._system.reenqueue_for_recovery, id, [self.settings.instance], QUEUE)
        self.look()

    async def cancel(self, id: str) -> None:
        """Records a job as cancelled, unless it ended."""
        await DBOS.cancel_workflow_async(id)
        await self._sync()

    async def delete(self, ids: Sequence[str]) -> None:
        for status in await DBOS.list_workflows_async(workflow_ids=list(ids), name=WORKFLOW, load_output=False):
            content = status.input["args"][0] if status.input else {}
            place = status.created_at or 0, content.get("created_at", 0.0), status.workflow_id
            self._gone[status.workflow_id] = status.authenticated_user or "", place
        while len(self._gone) > GONE:
            del self._gone[next(iter(self._gone))]
        await DBOS.delete_workflows_async(list(ids))
        await self._sync()

    async def known(self, ids: Sequence[str]) -> dict[str, bool]:
        """Returns those ids that the store has, and whether each has its video or may still get it."""
        found = await DBOS.list_workflows_async(workflow_ids=list(ids), load_input=False)
        outcomes = {status.workflow_id: outcome_of(status) for status in found}
        return {id: outcome is None or outcome["status"] != FAILED for id, outcome in outcomes.items()}

    async def ended(self, before: float | None = None, limit: int = 100) -> list[str]:
        """Returns the ids of jobs that ended, the oldest first; `before` a time, where it is given."""
        edge: dict[str, Any] = {} if before is None else {"completed_before": _moment(int(before * 1000))}
        passed = 0
        while True:
            found = await DBOS.list_workflows_async(
                name=WORKFLOW,
                status=FINISHED,
                limit=limit,
                offset=passed,
                load_input=False,
                load_output=before is not None,
                **edge,
            )
            # the database's clock may have been behind when the job ended
            ids = [status.workflow_id for status in found if before is None or end_of(status) <= before]
            if ids or len(found) < limit:
                return ids
            passed += limit


def sqlite_path(url: str) -> Path | None:
    """Returns the file of an SQLite URL; None for another database. StoreError for no URL."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise StoreError("the database is a URL such as sqlite:///jobs.sqlite or postgresql://user@host/name") from error
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def _moment(milliseconds: int) -> str:
    # half a millisecond more, since it is cut to whole ones after a way through floating point
    return datetime.fromtimestamp((milliseconds + 0.5) / 1000, UTC).isoformat()


def _order(record: Record) -> Place:
    # below Python 3.12 DBOS counts whole seconds in SQLite
    return record.created, record.job.created_at, record.job.id
