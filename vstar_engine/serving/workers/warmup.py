"""What a worker does before it is ready: takes every bucket through all stages, and measures whether a batch pays.

On a GPU it also takes steps of every batch that jobs may make of a bucket, so that none is recorded while a job waits.
"""

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vstar_engine.config.sampling import GUIDANCE_INTERVAL, Sampling
from vstar_engine.serving.jobs import result_files
from vstar_engine.serving.jobs.job import Job
from vstar_engine.warmup import PROMPT, fastest_step, passage, shortened

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
    """Runs every bucket through all stages once, with the options `fast`, and returns what was measured.

    {"batch_limits": {bucket: jobs}, "stage_seconds": {bucket: seconds of "begin", "step", "finish"}}. `known` holds the
    measurements of an earlier worker of the same server; they are not repeated.
    """
    limits, stage_seconds = dict(known.get("batch_limits", {})), dict(known.get("stage_seconds", {}))
    device = renderer.facts()["device"]
    sampling = replace(Sampling.usual(fast), steps=STEPS["cpu" if device.startswith("cpu") else "gpu"])
    for bucket in buckets:
        name = bucket_name(bucket[0], bucket[1:])
        measured = _whole(renderer, bucket, sampling)
        if name not in limits:
            stage_seconds[name] = measured
            most_here = min(most, renderer.most_at_once())
            limits[name] = _limit(renderer, bucket, stage_seconds[name]["step"], most_here, sampling)
            log.info("%s: %.3f s a step, batches of up to %d", name, stage_seconds[name]["step"], limits[name])
    if device.startswith("cuda"):
        _record(renderer, {bucket: limits[bucket_name(bucket[0], bucket[1:])] for bucket in buckets}, Sampling.usual(fast))
    return {"batch_limits": limits, "stage_seconds": stage_seconds}


def _record(renderer: Renderer, limits: Mapping[Bucket, int], usual: Sampling) -> None:
    """Takes the steps of every batch that jobs make: up to the limit, and of each number of guided videos in it."""
    # imported here: the worker loads this module before it loads PyTorch
    from vstar_engine.backends.cuda_graphs import growing

    guided = shortened(usual if usual.guidance != 1.0 else replace(usual, guidance=Sampling.guidance))
    plain = None if GUIDANCE_INTERVAL in usual.fast else replace(guided, guidance=1.0)
    with growing():
        for bucket, limit in limits.items():
            for count in range(1, limit + 1):
                for alone in range(count + 1 if plain else 1):
                    batch = [*[guided] * (count - alone), *([plain] * alone if plain else ())]
                    if _together(renderer, bucket, batch) == math.inf:
                        return


def _jobs(bucket: Bucket, samplings: Sequence[Sampling]) -> list[Job]:
    frames, height, width = bucket
    hows = [{name: getattr(sampling, name) for name in ("steps", "guidance", "fast")} for sampling in samplings]
    return [
        Job(f"warm-up-{i}", "", "", PROMPT, (PROMPT,), frames, (height, width), 0.0, i, **how) for i, how in enumerate(hows)
    ]


def _together(renderer: Renderer, bucket: Bucket, samplings: Sequence[Sampling]) -> float:
    """Returns the seconds of a step of videos together; infinite where they do not fit."""
    try:
        return fastest_step(renderer.begin(_jobs(bucket, samplings)), renderer.step)
    except (RuntimeError, MemoryError) as error:
        if not renderer.is_shortage(error):
            raise
        renderer.release()
        return math.inf


def _whole(renderer: Renderer, bucket: Bucket, sampling: Sampling) -> dict[str, float]:
    """Makes one video with few steps, writes it, and times the stages."""
    made = passage(lambda: renderer.begin(_jobs(bucket, [sampling])), renderer.step, renderer.finish)
    renderer.learn_colours(made.row, made.video)
    with tempfile.TemporaryDirectory() as folder:
        result_files.write(made.video, Path(folder), "warm-up", "warm-up")
    return made.seconds


def _limit(renderer: Renderer, bucket: Bucket, one: float, most: int, sampling: Sampling) -> int:
    """Widens the batch as long as that pays: gives the number of videos that are best made together."""
    limit, seconds = 1, one
    while limit < most:
        wider = min(2 * limit, most)
        wide = _together(renderer, bucket, [sampling] * wider)
        if wider / wide < PAYS * limit / seconds:
            break
        limit, seconds = wider, wide
    return limit
