"""The DBOS workflow of a job, and the callbacks through which the store reports to the server."""

import logging
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from dbos import DBOS

from vstar_engine.serving.jobs.job import Job

from .errors import UNAVAILABLE, Stopped
from .stored_job import MOST_RECOVERIES

log = logging.getLogger(__name__)

WORKFLOW = "generate"
Workflow = Callable[[dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]]


class StoreCallbacks(Protocol):
    """What the store calls while jobs run."""

    @property
    def stopping(self) -> bool:
        """Returns whether the server is shutting down."""

    async def make(self, job: Job) -> dict[str, Any]:
        """Makes a job's video and returns the outcome; Stopped if there is none to record."""

    def expect(self, job: Job, outcome: dict[str, Any]) -> None:
        """Keeps an outcome that is about to be written."""

    def recorded(self, id: str) -> None:
        """Publishes the outcome of a job, which is now on the disk."""

    def deleted(self, id: str) -> None:
        """Drops a job that was deleted before its outcome was written."""

    async def cancel(self, job: Job) -> None:
        """Stops a job that was cancelled before its outcome was written."""


def register(callbacks: StoreCallbacks) -> Workflow:
    """Registers the workflow with DBOS, which runs queued and recovered jobs by its name; returns it."""

    @DBOS.step(name="make")
    async def make(content: dict[str, Any]) -> dict[str, Any]:
        return await callbacks.make(Job.from_json(content))

    @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=MOST_RECOVERIES)
    async def generate(content: dict[str, Any]) -> dict[str, Any]:
        try:
            outcome = await make(content)
        except UNAVAILABLE as error:
            # the job stays pending; the watchdog resumes it once the database accepts writes again
            log.warning("an outcome could not be recorded: %s", type(error).__name__)
            raise Stopped from error
        callbacks.expect(Job.from_json(content), outcome)
        return outcome

    return generate
