"""The latest progress of each job, and the tracker that holds it for the jobs this server has seen."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from . import clock
from .events import Done, Event, Failed, Part, Stage, Started, Step
from .job import Job

QUEUED, RUNNING, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
# seconds that a finished job stays in the tracker; by then the store lists its outcome
KEPT = 60.0


def completed(done: Done) -> dict[str, Any]:
    """Returns the outcome to store for a completed job."""
    kept = {name: value for name, value in done.to_json().items() if name != "kind"}
    return {"status": COMPLETED, "at": clock.stamp(), **kept}


def failed(code: str, message: str) -> dict[str, Any]:
    """Returns the outcome to store for a failed job."""
    return {"status": FAILED, "at": clock.stamp(), "code": code, "message": message}


@dataclass
class JobProgress:
    """The latest progress of one job. A slow listener skips intermediate states and always gets the newest."""

    job: Job
    status: str = QUEUED
    batch: int = 0
    stage: str | None = None
    step: int = 0
    part: float = 0.0
    total: int = 0
    seconds_left: float | None = None
    preview: str | None = None
    outcome: dict[str, Any] | None = None
    version: int = 0
    finished_at: float | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def percent(self) -> int:
        """Returns the percentage of steps done, at most 99; a step in windows counts by its windows."""
        return min(99, int(100 * (self.step + self.part)) // (self.total or self.job.steps))

    def apply(self, event: Event) -> None:
        """Updates the progress from an engine's event. The outcome is set by `finish`, once the store has it."""
        match event:
            case Started():
                self.status, self.batch, self.step, self.part, self.preview = RUNNING, event.batch, 0, 0.0, None
            case Stage():
                self.stage = event.name
            case Step():
                self.step, self.total, self.seconds_left = event.done, event.total, event.seconds_left
                self.part, self.preview = 0.0, event.preview or self.preview
            case Part():
                self.part = event.done / event.total
            case Done() | Failed():
                return
        self.notify()

    def requeue(self) -> None:
        """Resets the job to queued: it waits for disk space."""
        self.status, self.stage, self.step, self.part, self.seconds_left = QUEUED, None, 0, 0.0, None
        self.notify()

    def finish(self, outcome: dict[str, Any]) -> None:
        """Sets the outcome; later calls change nothing."""
        if self.outcome is None:
            self.outcome, self.status, self.stage, self.seconds_left = outcome, outcome["status"], None, None
            self.finished_at = time.monotonic()
            self.notify()

    def notify(self) -> None:
        """Wakes every listener."""
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for_change(self, version: int, timeout: float) -> None:
        """Waits until the progress is newer than `version`, at most `timeout` seconds."""
        if self.version == version:
            try:
                await asyncio.wait_for(self._changed.wait(), timeout)
            except TimeoutError:
                return


class JobTracker:
    """The progress of the jobs that this server has seen lately, by id."""

    def __init__(self) -> None:
        self._entries: dict[str, JobProgress] = {}

    def __getitem__(self, id: str) -> JobProgress | None:
        return self._entries.get(id)

    def track(self, job: Job) -> JobProgress:
        """Returns the progress of a job; starts tracking it if needed."""
        return self._entries.setdefault(job.id, JobProgress(job))

    def discard(self, id: str) -> None:
        self._entries.pop(id, None)

    def drop_finished(self) -> None:
        """Drops the jobs that finished more than KEPT seconds ago."""
        now = time.monotonic()
        for id, entry in list(self._entries.items()):
            if entry.finished_at is not None and now - entry.finished_at > KEPT:
                del self._entries[id]

    def count(self, status: str) -> int:
        return sum(entry.status == status for entry in self._entries.values())
