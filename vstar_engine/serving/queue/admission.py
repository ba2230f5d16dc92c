"""Admission control: the number of jobs, the cost of each, and free disk space."""

import math
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping

from vstar_engine.serving.errors import LIMITED, SERVER, ApiError, invalid
from vstar_engine.serving.jobs.job import Job
from vstar_engine.serving.settings import MIB, Settings

# Retry-After is estimated from the ends of the latest jobs, within bounds in seconds
LATEST, SOONEST, LATEST_RETRY = 16, 1, 60
# a job stored within this many seconds may be missing from the last read of the store
SETTLED = 10.0


class Admission:
    """Counts unfinished jobs by owner. A check and its reservation are one step of the event loop, so the limits are exact."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic):
        self.settings, self._clock = settings, clock
        self.draining = False
        self._owners: dict[str, tuple[str, float]] = {}  # id -> owner, when the store had it
        self._per_owner: Counter[str] = Counter()
        self._ends: deque[float] = deque(maxlen=LATEST)

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, id: str) -> bool:
        return id in self._owners

    def restore(self, owners: Mapping[str, str]) -> None:
        """Adds jobs that were accepted earlier."""
        for id, owner in owners.items():
            self._hold(id, owner, self._clock())

    def check_budget(self, job: Job) -> None:
        """Raises ApiError for a job that exceeds the limits of one job."""
        limits = self.settings
        if job.frames > limits.max_frames:
            raise invalid(f"num_frames is at most {limits.max_frames} here, got {job.frames}", "num_frames", "too_large")
        if job.steps > limits.max_steps:
            raise invalid(
                f"num_inference_steps is at most {limits.max_steps} here, got {job.steps}", "num_inference_steps", "too_large"
            )
        if job.work > limits.max_work:
            raise invalid(
                f"frames x pixels x steps is at most {limits.max_work:.3g} here, got {job.work:.3g}: "
                "ask for fewer frames, fewer steps or a smaller size",
                "num_frames",
                "too_large",
            )

    def check_open(self) -> None:
        """Raises ApiError while the server shuts down or the disk is full."""
        if self.draining:
            raise ApiError(
                503, "draining", "the server is shutting down and accepts no jobs", None, SERVER, {"Retry-After": "5"}
            )
        free = shutil.disk_usage(self.settings.videos).free
        if free < self.settings.min_free:
            said = (
                f"{free // MIB} MiB are free in the results folder, the server keeps {self.settings.min_free // MIB} MiB free"
            )
            raise ApiError(507, "storage_full", said, None, SERVER, {"Retry-After": "30"})

    def reserve(self, id: str, owner: str) -> bool:
        """Reserves a place for a job; returns whether it is new. ApiError if the queue is full."""
        if id in self._owners:
            return False
        limits = self.settings
        if len(self._owners) >= limits.max_queue:
            raise self._full(f"the queue is full: {limits.max_queue} jobs wait or run", "queue_full")
        if limits.max_queue_per_key is not None and self._per_owner[owner] >= limits.max_queue_per_key:
            raise self._full(
                f"the queue of this key is full: {limits.max_queue_per_key} of its jobs wait or run", "key_queue_full"
            )
        self._hold(id, owner, math.inf)
        return True

    def _hold(self, id: str, owner: str, since: float) -> None:
        self._owners[id] = (owner, since)
        self._per_owner[owner] += 1

    def settle(self, id: str) -> None:
        """Marks a reserved job as stored."""
        if id in self._owners:
            self._owners[id] = (self._owners[id][0], self._clock())

    def release(self, id: str) -> None:
        """Frees the place of a finished job and records its end for `retry_after`."""
        if self.give_back(id):
            self._ends.append(self._clock())

    def give_back(self, id: str) -> bool:
        """Frees a place; returns whether there was one."""
        owner, _ = self._owners.pop(id, (None, 0.0))
        if owner is None:
            return False
        self._per_owner[owner] -= 1
        if not self._per_owner[owner]:
            del self._per_owner[owner]
        return True

    def reconcile(self, unfinished: Mapping[str, str]) -> None:
        """Frees the places of jobs that ended on other servers."""
        now = self._clock()
        for id, (_, since) in list(self._owners.items()):
            if id not in unfinished and now - since > SETTLED:
                self.give_back(id)

    def retry_after(self) -> int:
        """Returns the estimated seconds until a place is free."""
        if len(self._ends) < 2:
            return SOONEST
        each = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return max(SOONEST, min(LATEST_RETRY, math.ceil(each)))

    def _full(self, message: str, code: str) -> ApiError:
        return ApiError(429, code, message, None, LIMITED, {"Retry-After": str(self.retry_after())})
