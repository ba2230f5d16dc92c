"""What a worker asks of the thing that makes videos; `model.Model` is one, and tests bring their own."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from vstar_engine.serving.jobs.job import Job
from vstar_engine.video import Video


class Row(Protocol):
    """One video of a batch; `index` is its place among the jobs."""

    index: int


class Batch(Protocol):
    """Videos on their way together: `done` of `steps` steps are taken, `seconds` is what each stage took."""

    rows: list[Any]
    done: int
    seconds: dict[str, float]

    @property
    def steps(self) -> int: ...

    def drop(self, index: int) -> None:
        """Takes a video out between two steps."""


class Renderer(Protocol):
    """Takes jobs to videos, a step at a time."""

    def facts(self) -> dict[str, Any]:
        """Describes the model as `events.FACTS` says, but for what warming up measures."""

    def buckets(self) -> list[tuple[int, int, int]]:
        """Returns the clips (frames, height, width) to warm where none are named."""

    def most_at_once(self) -> int:
        """Returns the largest batch that the engine was built for."""

    def begin(self, jobs: Sequence[Job]) -> Batch:
        """Prepares jobs of one shape. Raises ValueError for a job that makes no sense."""

    def step(self, batch: Any) -> None:
        """Takes every video of a batch one step further, and returns when that is done."""

    def finish(self, batch: Any, row: Any, on_part: Callable[[Video], None] | None = None) -> Video:
        """Decodes a video whose steps are done; `on_part` hears each run of frames, and what it raises ends the decoding."""

    def learn_colours(self, row: Any, video: Video) -> None:
        """Learns from a finished video what `preview` needs."""

    def preview(self, row: Any) -> np.ndarray | None:
        """Shows some frames so far side by side, (h, w, 3) uint8."""

    def counters(self) -> dict[str, int]:
        """Counts what its caches did since the start."""

    def is_shortage(self, error: BaseException) -> bool:
        """Returns whether an error means that something did not fit into memory."""

    def is_fatal(self, error: BaseException) -> bool:
        """Returns whether after an error only a new process helps."""

    def release(self) -> None:
        """Returns back memory after a shortage."""
