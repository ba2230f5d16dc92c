"""The protocol between a worker and what makes its videos: `engine_renderer.EngineRenderer`, or a test's own renderer."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from vstar_engine.serving.jobs.job import Job
from vstar_engine.video import Video


class Row(Protocol):
    """One video of a batch; `index` is that of its job."""

    index: int


class Batch(Protocol):
    """Videos that are denoised together: `done` of `steps` steps are taken; `seconds` holds the time of each stage.

    `on_part` is called with (parts done, all parts) by a step that has parts.
    """

    rows: list[Any]
    done: int
    seconds: dict[str, float]
    on_part: Callable[[int, int], None] | None

    @property
    def steps(self) -> int: ...

    def drop(self, index: int) -> None:
        """Removes a video from the batch, between two steps."""


class Renderer(Protocol):
    """Makes the videos of jobs, one step at a time."""

    def facts(self) -> dict[str, Any]:
        """Returns the facts of `events.FACTS`, except those that warm-up measures."""

    def buckets(self) -> list[tuple[int, int, int]]:
        """Returns the default clips to warm, as (frames, height, width)."""

    def most_at_once(self) -> int:
        """Returns the largest batch that the engine was built for."""

    def begin(self, jobs: Sequence[Job]) -> Batch:
        """Starts a batch of jobs of one shape; ValueError for an invalid job."""

    def step(self, batch: Any) -> None:
        """Takes one step of a batch; returns once it is done on the device."""

    def finish(self, batch: Any, row: Any, on_frames: Callable[[Video], None] | None = None) -> Video:
        """Decodes a finished video. `on_frames` is called after each run of frames; an exception in it stops decoding."""

    def learn_colours(self, row: Any, video: Video) -> None:
        """Fits the colours of `preview` to a finished video."""

    def preview(self, row: Any) -> np.ndarray | None:
        """Returns some current frames side by side, (h, w, 3) uint8; None if there is no preview."""

    def counters(self) -> dict[str, int]:
        """Returns the counters of the caches since the start."""

    def is_shortage(self, error: BaseException) -> bool:
        """Returns whether an error means that memory ran out."""

    def is_fatal(self, error: BaseException) -> bool:
        """Returns whether an error requires a new process."""

    def release(self) -> None:
        """Frees memory after a shortage."""
