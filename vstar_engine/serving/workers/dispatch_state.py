"""What the dispatcher keeps account of: jobs on their way, batches on workers, and the rules for both."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from vstar_engine.errors import VstarError
from vstar_engine.serving.jobs import events
from vstar_engine.serving.jobs.job import Job

Message = dict[str, Any]


class WorkerError(VstarError, RuntimeError):
    """A worker cannot be started; another try with the same settings would not help."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class Link(Protocol):
    """A way to one worker, which can be opened again when it broke."""

    name: str

    async def open(self, message: Message) -> AsyncIterator[Message]:
        """Starts a worker with a start message; gives what it says, until it is gone."""

    def send(self, message: Message) -> None:
        """Tells the worker something; what a dead one is told is lost."""

    async def kill(self) -> None:
        """Ends the worker at once."""


@dataclass(frozen=True)
class Rules:
    """How jobs are put onto workers.

    `buckets` (frames, height, width) are warmed, none: those that the model names. At most `max_batch` jobs form one batch, and
    only where warming up measured that it pays; an idle worker waits `batch_delay` seconds for company. A job that was in a
    worker which died is tried `tries` times in all. `hang_after` is the least silence, in seconds, that counts as hung; None:
    10 on a GPU, 60 on a CPU, whose steps vary. A job is short, so that it may go between the steps of another, where it takes
    at most `short` of what is left of that; together such jobs lengthen it by at most `lent` of its own time. What is warmed is
    sampled as `fast` says.
    """

    buckets: tuple[tuple[int, int, int], ...] = ()
    max_batch: int = 4
    batch_delay: float = 0.03
    tries: int = 3
    hang_after: float | None = None
    start_timeout: float = 900.0
    short: float = 0.25
    lent: float = 0.5
    fast: tuple[str, ...] = ()


@dataclass(eq=False)
class PendingJob:
    """A job on its way: what its stream still has to hear, and how often it was tried."""

    job: Job
    order: int
    arrived: float
    heard: "asyncio.Queue[events.Event]" = field(default_factory=asyncio.Queue)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    tries: int = 0
    alone: bool = False  # runs in a batch of its own: it was on a worker that failed
    cancelled: bool = False
    worker: "WorkerState | None" = None
    together: bool = False  # something else was on the worker with it

    @property
    def rank(self) -> tuple[int, int]:
        return -self.job.priority, self.order


@dataclass(eq=False)
class RunningBatch:
    """A batch on a worker: what it should take in seconds, and what it lent to shorter ones."""

    jobs: list[PendingJob]
    expected: float
    began: float
    lent: float = 0.0
    done: int = 0

    @property
    def job(self) -> Job:
        return self.jobs[0].job

    @property
    def left(self) -> float:
        return self.expected * (1 - self.done / self.job.steps)


@dataclass(eq=False)
class WorkerState:
    """One worker as it stands: its batches, and since when it has been silent."""

    link: Link
    ready: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    batches: dict[int, RunningBatch] = field(default_factory=dict)
    jobs: set[PendingJob] = field(default_factory=set)
    silent: float = 0.0
    fault: str = events.WORKER_CRASHED
