"""The warm-up of a worker: runs every bucket through all stages and measures which batch sizes pay.

On a GPU it also runs every batch that jobs may form, so that no CUDA graph is captured while a job waits.
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

# a batch pays if its throughput is at least this multiple of that of half the batch
PAYS = 1.1
# number of timed steps; the fastest counts, since the first ones on a GPU load kernels and capture graphs
STEPS = {"cpu": 2, "gpu": 5}

# frames, height, width
Bucket = tuple[int, int, int]


def bucket_name(frames: int, size: Sequence[int]) -> str:
    """Returns the name of a clip, such as "16x320x512"."""
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
        _capture(renderer, {bucket: limits[bucket_name(bucket[0], bucket[1:])] for bucket in buckets}, Sampling.usual(fast))
    return {"batch_limits": limits, "stage_seconds": stage_seconds}


def _capture(renderer: Renderer, limits: Mapping[Bucket, int], usual: Sampling) -> None:
    """Runs every batch up to the limits, with each possible number of guided videos, so that its CUDA graph is captured."""
    # imported late: the worker loads this module before PyTorch
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
    about: dict[str, Any] = {"key_id": "", "model": "", "prompt": PROMPT, "states": (PROMPT,), "created_at": 0.0}
    return [Job(id=f"warm-up-{i}", frames=frames, size=(height, width), seed=i, **about, **how) for i, how in enumerate(hows)]


def _together(renderer: Renderer, bucket: Bucket, samplings: Sequence[Sampling]) -> float:
    """Returns the seconds of a step of a batch; infinite if it does not fit into memory."""
    try:
        return fastest_step(renderer.begin(_jobs(bucket, samplings)), renderer.step)
    except (RuntimeError, MemoryError) as error:
        if not renderer.is_shortage(error):
            raise
        renderer.release()
        return math.inf


def _whole(renderer: Renderer, bucket: Bucket, sampling: Sampling) -> dict[str, float]:
    """Makes and writes one video with few steps; returns the seconds of each stage."""
    made = passage(lambda: renderer.begin(_jobs(bucket, [sampling])), renderer.step, renderer.finish)
    renderer.learn_colours(made.row, made.video)
    with tempfile.TemporaryDirectory() as folder:
        result_files.write(made.video, Path(folder), "warm-up", "warm-up")
    return made.seconds


def _limit(renderer: Renderer, bucket: Bucket, one: float, most: int, sampling: Sampling) -> int:
    """Returns the largest batch that pays, by doubling it as long as the throughput grows."""
    limit, seconds = 1, one
    while limit < most:
        wider = min(2 * limit, most)
        wide = _together(renderer, bucket, [sampling] * wider)
        if wider / wide < PAYS * limit / seconds:
            break
        limit, seconds = wider, wide
    return limit
