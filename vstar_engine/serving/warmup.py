"""What a worker does before it is ready: takes every bucket through all stages, and measures whether a batch pays."""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import Sampling
from ..warm import PROMPT, fastest_step, passage
from . import results
from .job import Job
from .renderer import Renderer

log = logging.getLogger(__name__)

# a batch is used where it makes at least so many times the videos of half of it in the same time
PAYS = 1.1
# steps that are timed, of which the fastest counts: on a GPU the first ones load kernels and capture graphs
STEPS = {"cpu": 2, "gpu": 5}

# frames, height, width
Bucket = tuple[int, int, int]


def bucket_name(frames: int, size: Sequence[int]) -> str:
    """Names a clip as in "16x320x512"."""
    return "x".join(map(str, (frames, *size)))


def warm(
    renderer: Renderer, buckets: Sequence[Bucket], most: int, known: dict[str, Any], fast: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Takes every bucket through all stages once, sampled as `fast` says, and gives what was measured.

    {"batch_limits": {bucket: jobs}, "paces": {bucket: seconds of "begin", "step", "finish"}}. `known` is what an earlier worker
    of the same server measured, which is not measured again.
    """
    limits, paces = dict(known.get("batch_limits", {})), dict(known.get("paces", {}))
    steps = STEPS["cpu" if renderer.facts()["device"].startswith("cpu") else "gpu"]
    sampling = replace(Sampling.usual(fast), steps=steps)
    for bucket in buckets:
        name = bucket_name(bucket[0], bucket[1:])
        measured = _whole(renderer, bucket, sampling)
        if name not in limits:
            paces[name] = measured
            most_here = min(most, renderer.most_at_once())
            limits[name] = _limit(renderer, bucket, paces[name]["step"], most_here, sampling)
            log.info("%s: %.3f s a step, batches of up to %d", name, paces[name]["step"], limits[name])
    return {"batch_limits": limits, "paces": paces}


def _jobs(bucket: Bucket, count: int, sampling: Sampling) -> list[Job]:
    frames, height, width = bucket
    how = {name: getattr(sampling, name) for name in ("steps", "guidance", "fast")}
    return [Job(f"warm-up-{i}", "", "", PROMPT, (PROMPT,), frames, (height, width), 0.0, i, **how) for i in range(count)]


def _together(renderer: Renderer, bucket: Bucket, count: int, sampling: Sampling) -> float:
    """Gives the seconds of a step of `count` videos together."""
    return fastest_step(renderer.begin(_jobs(bucket, count, sampling)), renderer.step)


def _whole(renderer: Renderer, bucket: Bucket, sampling: Sampling) -> dict[str, float]:
    """Makes one video with few steps, writes it, and times the stages."""
    made = passage(lambda: renderer.begin(_jobs(bucket, 1, sampling)), renderer.step, renderer.finish)
    renderer.learn_colours(made.row, made.video)
    with tempfile.TemporaryDirectory() as folder:
        results.write(made.video, Path(folder), "warm-up", "warm-up")
    return made.seconds


def _limit(renderer: Renderer, bucket: Bucket, one: float, most: int, sampling: Sampling) -> int:
    """Widens the batch as long as that pays: gives the number of videos that are best made together."""
    limit, seconds = 1, one
    while limit < most:
        wider = min(2 * limit, most)
        try:
            wide = _together(renderer, bucket, wider, sampling)
        except (RuntimeError, MemoryError) as error:
            if not renderer.is_shortage(error):
                raise
            renderer.release()
            break
        if wider / wide < PAYS * limit / seconds:
            break
        limit, seconds = wider, wide
    return limit
