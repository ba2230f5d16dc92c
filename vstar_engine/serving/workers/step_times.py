"""Estimates how long jobs take: measured at warm-up, updated while running, scaled by size for other clips."""

from collections.abc import Mapping
from typing import Any

from vstar_engine.serving.jobs.job import Job

# weight of a new measurement in the moving average
NEW_WEIGHT = 0.3

# frames, height, width
Clip = tuple[int, int, int]


class StepTimes:
    """Seconds of each stage ("begin", "step", "finish") of one video, by clip."""

    def __init__(self) -> None:
        self.known: dict[Clip, dict[str, float]] = {}

    def add_measured(self, stage_seconds: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds what warm-up measured, by bucket, such as "16x320x512"."""
        for name, seconds in stage_seconds.items():
            frames, height, width = map(int, name.split("x"))
            self.known.setdefault((frames, height, width), dict(seconds))

    def update(self, job: Job, batch: int, seconds: float) -> None:
        """Updates the average with the seconds of a step of a batch."""
        clip, each = (job.frames, *job.size), seconds / batch
        if clip not in self.known:
            self.known[clip] = {**self._stages(job), "step": each}
        known = self.known[clip]
        known["step"] += NEW_WEIGHT * (each - known["step"])

    def _stages(self, job: Job) -> dict[str, float]:
        clip = (job.frames, *job.size)
        if clip in self.known:
            return self.known[clip]
        if not self.known:
            return {"begin": 0.0, "step": 0.0, "finish": 0.0}

        def cells(clip: Clip) -> int:
            return clip[0] * clip[1] * clip[2]

        nearest = min(self.known, key=lambda other: abs(cells(other) - cells(clip)))
        ratio = cells(clip) / cells(nearest)
        return {stage: seconds * ratio for stage, seconds in self.known[nearest].items()}

    def longest_silence(self, job: Job, batch: int) -> float:
        """Returns the longest time in seconds between two messages of a batch."""
        stages = self._stages(job)
        return max(stages["begin"] * batch, stages["step"] * batch, stages["finish"])

    def batch_seconds(self, job: Job, batch: int) -> float:
        """Returns the estimated seconds of a batch, from its start to its last decoded frame."""
        stages = self._stages(job)
        return batch * (stages["begin"] + job.steps * stages["step"] + stages["finish"])
