"""The state of the dispatcher: pending jobs, running batches, workers, and the batching policy."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from vstar_engine.errors import VstarError
from vstar_engine.serving.jobs import events
from vstar_engine.serving.jobs.job import Job

Message = dict[str, Any]


class WorkerError(VstarError, RuntimeError):
    """A worker cannot be started with these settings."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class Link(Protocol):
    """The connection to one worker; it can be reopened after the worker ended."""

    name: str

    async def open(self, message: Message) -> AsyncIterator[Message]:
        """Starts the worker with a start message; returns an iterator over its messages, until it ends."""

    def send(self, message: Message) -> None:
        """Sends the worker a message; a message to a dead worker is lost."""

    async def kill(self) -> None:
        """Kills the worker."""


@dataclass(frozen=True)
class BatchingPolicy:
    """How jobs are assigned to workers.

    buckets: clips (frames, height, width) to warm; empty: those that the model names.
    max_batch: largest batch; warm-up lowers it where a larger one does not pay.
    batch_delay: seconds that an idle worker waits for more jobs to fill a batch.
    tries: runs of a job whose worker dies, in all.
    hang_after: least silence in seconds that counts as a hang; None: 10 on a GPU, 60 on a CPU, whose steps vary.
    start_timeout: seconds until a worker must be ready.
    restart_pause: seconds before a failed restart is repeated; doubled each time.
    short_job_share: a job may run between the steps of a batch if it takes at most this share of the batch's remaining time.
    interleaved_share: such jobs together delay a batch by at most this share of its own time.
    fast: the fast-sampling options that warm-up uses.
    """

    buckets: tuple[tuple[int, int, int], ...] = ()
    max_batch: int = 4
    batch_delay: float = 0.03
    tries: int = 3
    hang_after: float | None = None
    start_timeout: float = 900.0
    restart_pause: float = 0.2
    short_job_share: float = 0.25
    interleaved_share: float = 0.5
    fast: tuple[str, ...] = ()


@dataclass(eq=False)
class PendingJob:
    """A submitted job: its undelivered events, its tries and where it runs.

    alone: it must run in a batch of its own, since it was on a worker that failed.
    together: another job was on the worker at the same time.
    """

    job: Job
    order: int
    arrived: float
    stream: "asyncio.Queue[events.Event]" = field(default_factory=asyncio.Queue)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    tries: int = 0
    alone: bool = False
    cancelled: bool = False
    worker: "WorkerState | None" = None
    together: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        """Returns the sort key: higher priority first, then order of arrival."""
        return -self.job.priority, self.order


@dataclass(eq=False)
class RunningBatch:
    """A batch on a worker: its expected seconds, and the seconds given to interleaved jobs."""

    jobs: list[PendingJob]
    expected: float
    began: float
    interleaved: float = 0.0
    done: int = 0

    @property
    def job(self) -> Job:
        return self.jobs[0].job

    @property
    def left(self) -> float:
        """Returns the expected seconds until the batch is done."""
        return self.expected * (1 - self.done / self.job.steps)


@dataclass(eq=False)
class WorkerState:
    """A worker: its connection, its batches and the seconds since its last message."""

    link: Link
    ready: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    batches: dict[int, RunningBatch] = field(default_factory=dict)
    jobs: set[PendingJob] = field(default_factory=set)
    silent: float = 0.0
    fault: str = events.WORKER_CRASHED
