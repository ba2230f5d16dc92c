"""Jobs as they run: what is newest of each, for whoever listens."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from . import clock
from .events import Done, Event, Failed, Stage, Started, Step
from .job import Job

QUEUED, RUNNING, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
# how long an ended job is remembered: until the store surely tells of it
REMEMBERED = 60.0


def completed(done: Done) -> dict[str, Any]:
    """Returns what the store keeps of a job that has its video."""
    kept = {name: value for name, value in done.to_json().items() if name != "kind"}
    return {"status": COMPLETED, "at": clock.stamp(), **kept}


def failed(code: str, message: str) -> dict[str, Any]:
    """Returns what the store keeps of a job that has none."""
    return {"status": FAILED, "at": clock.stamp(), "code": code, "message": message}


@dataclass
class Live:
    """The newest of one job. Listeners see every state that lasts, and skip what they are too slow for."""

    job: Job
    status: str = QUEUED
    batch: int = 0
    stage: str | None = None
    step: int = 0
    seconds_left: float | None = None
    preview: str | None = None
    outcome: dict[str, Any] | None = None
    version: int = 0
    ended: float | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def progress(self) -> int:
        """Returns the share of steps done in percent, 99 at most before the end."""
        return min(99, 100 * self.step // self.job.steps)

    def hear(self, event: Event) -> None:
        """Takes an engine's event in; the outcome comes later, when the store has it."""
        match event:
            case Started():
                self.status, self.batch, self.step, self.preview = RUNNING, event.batch, 0, None
            case Stage():
                self.stage = event.name
            case Step():
                self.step, self.seconds_left = event.done, event.seconds_left
                self.preview = event.preview or self.preview
            case Done() | Failed():
                return
        self.changed()

    def wait_for_space(self) -> None:
        """Goes back to the queue until there is room for the video."""
        self.status, self.stage, self.step, self.seconds_left = QUEUED, None, 0, None
        self.changed()

    def end(self, outcome: dict[str, Any]) -> None:
        """Tells the outcome; the first one counts."""
        if self.outcome is None:
            self.outcome, self.status, self.stage, self.seconds_left = outcome, outcome["status"], None, None
            self.ended = time.monotonic()
            self.changed()

    def changed(self) -> None:
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def after(self, version: int, timeout: float) -> None:
        """Returns when there is something newer than `version`, or after `timeout` seconds."""
        if self.version == version:
            try:
                await asyncio.wait_for(self._changed.wait(), timeout)
            except TimeoutError:
                return


class Board:
    """Every job this server has heard of lately, by id."""

    def __init__(self) -> None:
        self._lives: dict[str, Live] = {}

    def __getitem__(self, id: str) -> Live | None:
        return self._lives.get(id)

    def open(self, job: Job) -> Live:
        """Returns a job's entry, made if need be."""
        return self._lives.setdefault(job.id, Live(job))

    def drop(self, id: str) -> None:
        self._lives.pop(id, None)

    def forget(self) -> None:
        """Drops jobs that ended a while ago."""
        now = time.monotonic()
        for id, live in list(self._lives.items()):
            if live.ended is not None and now - live.ended > REMEMBERED:
                del self._lives[id]

    def count(self, status: str) -> int:
        return sum(live.status == status for live in self._lives.values())
