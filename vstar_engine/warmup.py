"""Warm-up: runs a clip before the first request, so that kernels are loaded and tuned and steps are recorded."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.config.models import Spec
from vstar_engine.config.request import Request
from vstar_engine.config.sampling import Sampling

from .video import Video

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

# frames, height, width
ClipSize = tuple[int, int, int]
PROMPT = "red and blue flowers on a green meadow, white clouds"
# how often a step of each kind is taken: the first plain, the second recorded
RUNS = 2
# frames of the clips that are warmed where nothing says which: on a GPU also the length most videos have
USUAL = {"cpu": (16,), "cuda": (16, 64)}


@dataclass(frozen=True)
class Passage:
    """A video that ran through all stages, and the seconds of each; of the steps the fastest counts."""

    row: Any
    video: Video
    seconds: dict[str, float]


def passage(begin: Callable[[], Any], step: Callable[[Any], object], finish: Callable[[Any, Any], Video]) -> Passage:
    """Runs the batch that `begin` returns through all stages."""
    start = time.perf_counter()
    batch = begin()
    begun = time.perf_counter()
    fastest = fastest_step(batch, step)
    stepped = time.perf_counter()
    row = batch.rows[0]
    video = finish(batch, row)
    return Passage(row, video, {"begin": begun - start, "step": fastest, "finish": time.perf_counter() - stepped})


def fastest_step(batch: Any, step: Callable[[Any], object]) -> float:
    """Takes all steps of a batch; returns the seconds of the fastest."""
    taken = []
    for _ in range(batch.steps):
        start = time.perf_counter()
        step(batch)
        taken.append(time.perf_counter() - start)
    return min(taken)


def usual_clips(spec: Spec, device: "torch.device", artifact: BuiltEngine | None) -> list[ClipSize]:
    """Returns the clips to warm by default: those of a built engine, else usual lengths in the model's own size."""
    frames, size = USUAL[device.type], spec.size
    if artifact is not None:
        frames, size = tuple(artifact.identity["frames"]) or frames, tuple(artifact.identity["size"] or size)
    return [(count, *size) for count in frames]


def warm_up(engine: Any, clips: Sequence[ClipSize], sampling: Sampling) -> None:
    """Runs clips of some sizes through all stages of an engine, and keeps what each recorded."""
    # imported here, as what follows: a server's worker loads this module before it loads PyTorch
    from vstar_engine.backends.cuda_graphs import growing

    def made_up(texts: Sequence[str]) -> "Tensor":
        import torch

        shape = len(texts), engine.spec.text.context_length, engine.spec.unet.context_dim
        return torch.zeros(shape, device=engine.device, dtype=engine.dtype)

    encode = made_up if engine.text is None else None
    with growing():
        for frames, height, width in clips:
            request = Request((PROMPT,), frames, size=(height, width), sampling=shortened(sampling))
            made = passage(partial(engine.begin, [request], encode=encode), lambda batch: batch.step(), engine.finish)
            stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in made.seconds.items())
            log.info("warmed %d frames of %dx%d: %s", frames, height, width, stages)


def shortened(sampling: Sampling) -> Sampling:
    """Returns the settings with the fewest steps that run each kind of step `RUNS` times."""
    wanted = set(kinds(sampling))
    for steps in range(RUNS, sampling.steps):
        short = replace(sampling, steps=steps)
        if all(kinds(short).count(kind) >= RUNS for kind in wanted):
            return short
    return sampling


def kinds(sampling: Sampling) -> list[tuple[bool, bool]]:
    """Returns the kind of each step: whether it is guided, and whether it runs the whole network."""
    return [(sampling.guided(index), sampling.whole(index)) for index in range(sampling.steps)]
