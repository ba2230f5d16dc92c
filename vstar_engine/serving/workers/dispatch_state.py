"""What the dispatcher keeps account of: jobs on their way, batches on workers, and the policy for both."""

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
class BatchingPolicy:
    """How jobs are assigned to workers.

    buckets: clips (frames, height, width) to warm; empty: those that the model names.
    max_batch: largest batch; warm-up lowers it where a larger one does not pay.
    batch_delay: seconds that an idle worker waits for more jobs to fill a batch.
    tries: runs of a job whose worker dies, in all.
    hang_after: least silence in seconds that counts as a hang; None: 10 on a GPU, 60 on a CPU, whose steps vary.
    start_timeout: seconds until a worker must be ready.
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
    short_job_share: float = 0.25
    interleaved_share: float = 0.5
    fast: tuple[str, ...] = ()


@dataclass(eq=False)
class PendingJob:
    """A job on its way: what its stream still has to hear, and how often it was tried."""

    job: Job
    order: int
    arrived: float
    stream: "asyncio.Queue[events.Event]" = field(default_factory=asyncio.Queue)
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
    interleaved: float = 0.0
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
