"""The changes that this server makes to DBOS's internals, each with its reason.

DBOS has no public setting for any of them. `tests/serving/test_store.py` checks that the patched names exist.
"""

import asyncio
import contextvars
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import dbos._dbos
import dbos._workflow_commands
from dbos import DBOS
from dbos._serialization import DBOSDefaultSerializer

from .errors import UNAVAILABLE, Stopped

log = logging.getLogger(__name__)

# the methods of DBOS's system database that write a job's outcome
OUTCOME_WRITES = ("record_operation_result", "update_workflow_outcome")
# seconds between DBOS's checks for jobs with a delay or a deadline, which this server does not use
BACKGROUND_INTERVAL = 60.0
Answer = TypeVar("Answer")


def refuse_pickle() -> None:
    """Makes DBOS refuse pickled values. It would unpickle any row that says so, and thereby run code from the database."""

    def deserialize(text: str) -> Any:
        raise TypeError("the database holds a pickled value, which would run code: it was not written by this server")

    DBOSDefaultSerializer.deserialize = deserialize  # type: ignore[method-assign, assignment]


@contextmanager
def quiet_launch() -> Iterator[None]:
    """Sends DBOS's log to the server's handlers, muted inside the block.

    DBOS logs a traceback for a database that cannot be opened; the store answers that with one sentence.
    """
    its = logging.getLogger("dbos")
    its.handlers.clear()
    its.propagate, its.disabled = True, True
    try:
        yield
    finally:
        its.disabled = False


def retry_outcome_writes(system: Any, stopping: Callable[[], bool], pause: float) -> None:
    """Makes outcome writes wait for the database. DBOS would record a failed write as the failure of the job."""
    for name in OUTCOME_WRITES:
        setattr(system, name, retried(getattr(system, name), stopping, pause))


def retried(write: Callable[..., Answer], stopping: Callable[[], bool], pause: float) -> Callable[..., Answer]:
    """Returns `write` repeated every `pause` seconds until it succeeds; Stopped once the server is `stopping`."""

    @functools.wraps(write)
    def until_written(*args: Any, **settings: Any) -> Answer:
        logged = False
        while True:
            try:
                return write(*args, **settings)
            except UNAVAILABLE as error:
                if stopping():
                    raise Stopped from error
                if not logged:
                    log.warning("an outcome cannot be recorded yet: %s", type(error).__name__)
            logged = True
            time.sleep(pause)

    return until_written


def report_outcomes(system: Any, report: Callable[[str, bool], None]) -> None:
    """Calls `report(id, landed)` in this event loop after each write that completes a job.

    DBOS has no hook there. `landed` is false if the job was cancelled or deleted first.
    """
    loop, write = asyncio.get_running_loop(), system.update_workflow_outcome

    @functools.wraps(write)
    def write_and_report(id: str, status: str, **values: Any) -> bool:
        landed = write(id, status, **values)
        if status == "SUCCESS" and not loop.is_closed():
            # an empty context: in that of the finished workflow DBOS would record a database read as one of its steps
            loop.call_soon_threadsafe(report, id, landed, context=contextvars.Context())
        return landed

    system.update_workflow_outcome = write_and_report


def stop_polling() -> None:
    """Keeps DBOS, before its launch, from polling the queues: `queue_worker` runs those loops and wakes them for new jobs.

    At DBOS's fixed interval the polls of an idle server take 7.5 % of a core.
    """
    dbos._dbos.queue_thread = _listen_to_nothing
    dbos._workflow_commands._BACKGROUND_JOBS_INTERVAL_SEC = BACKGROUND_INTERVAL


def _listen_to_nothing(stop_event: threading.Event, dbos: DBOS) -> None:
    """Replaces DBOS's queue thread, which has nothing to do."""
