"""How long work takes: measured at warm-up and while working, and stretched by size to what was not measured."""

from collections.abc import Mapping
from typing import Any

from vstar_engine.serving.jobs.job import Job

# how much a new measurement counts
FRESH = 0.3

# frames, height, width
Clip = tuple[int, int, int]


class Pace:
    """Seconds of each stage of a clip: "begin", "step" and "finish" of one video."""

    def __init__(self) -> None:
        self.known: dict[Clip, dict[str, float]] = {}

    def learn(self, paces: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes what warming up measured, by bucket as "16x320x512"."""
        for name, seconds in paces.items():
            frames, height, width = map(int, name.split("x"))
            self.known.setdefault((frames, height, width), dict(seconds))

    def note(self, job: Job, batch: int, seconds: float) -> None:
        """Takes what a step of a batch has just taken."""
        clip, each = (job.frames, *job.size), seconds / batch
        if clip not in self.known:
            self.known[clip] = {**self._stages(job), "step": each}
        known = self.known[clip]
        known["step"] += FRESH * (each - known["step"])

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

    def longest(self, job: Job, batch: int) -> float:
        """Returns the longest that a batch works without a word."""
        stages = self._stages(job)
        return max(stages["begin"] * batch, stages["step"] * batch, stages["finish"])

    def whole(self, job: Job, batch: int) -> float:
        """Returns the seconds from a batch's begin to its last decoded frame."""
        stages = self._stages(job)
        return batch * (stages["begin"] + job.steps * stages["step"] + stages["finish"])
