"""The jobs that wait for a worker, and the choice of the batch that a worker runs next."""

import time
from collections.abc import Iterator, Mapping

from vstar_engine.serving.jobs.job import Job

from .dispatch_state import BatchingPolicy, PendingJob, WorkerState
from .step_times import StepTimes


class WaitingJobs:
    """Jobs without a worker, ordered by priority and arrival."""

    def __init__(self, policy: BatchingPolicy, step_times: StepTimes):
        self.policy, self.step_times = policy, step_times
        self._jobs: list[PendingJob] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[PendingJob]:
        return iter(self._jobs)

    def add(self, pending: PendingJob) -> None:
        self._jobs.append(pending)
        self._jobs.sort(key=lambda each: each.rank)

    def remove(self, pending: PendingJob) -> None:
        self._jobs.remove(pending)

    def clear(self) -> None:
        self._jobs.clear()

    def next_batch(self, worker: WorkerState, idle: int) -> tuple[list[PendingJob], float | None]:
        """Returns the batch for a worker, one of `idle` idle ones.

        If more jobs may still join: no batch, and the seconds to wait for them.
        """
        if not self._jobs:
            return [], None
        first = self._jobs[0]
        if first.alone and worker.jobs:  # videos are being written; the worker reports their end
            return [], None
        found = self._batch_with(first, worker, idle)
        left = first.arrived + self.policy.batch_delay - time.monotonic()
        if not first.alone and idle == 1 and len(found) < largest_batch(worker, first.job) and left > 0:
            return [], left
        return found, None

    def interleavable(self, worker: WorkerState) -> list[PendingJob]:
        """Returns short jobs to run between the steps of the only batch on a worker, within the policy's shares."""
        (batch, *others) = worker.batches.values()
        if others or batch.jobs[0].alone:
            return []
        for first in self._jobs:
            found = self._batch_with(first, worker)
            takes = self.step_times.batch_seconds(first.job, len(found))
            short = takes <= self.policy.short_job_share * batch.left
            affordable = batch.interleaved + takes <= self.policy.interleaved_share * batch.expected
            if short and affordable and not first.alone:
                batch.interleaved += takes
                return found
        return []

    def _batch_with(self, first: PendingJob, worker: WorkerState, workers: int = 1) -> list[PendingJob]:
        """Returns the jobs that form a batch with `first`, that one first; all such jobs are spread over `workers`."""
        if first.alone:
            return [first]
        alike = [pending for pending in self._jobs if pending.job.shape == first.job.shape and not pending.alone]
        return alike[: min(largest_batch(worker, first.job), -(-len(alike) // workers))]


def largest_batch(worker: WorkerState, job: Job) -> int:
    """Returns the largest batch of such jobs that pays on a worker, as measured at warm-up."""
    limits: Mapping[str, int] = worker.facts["batch_limits"]
    return limits.get("x".join(map(str, (job.frames, *job.size))), 1)
