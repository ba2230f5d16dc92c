"""Warnings, each given once, of requests that a model was not trained for or that likely mean something else."""

import logging
import re
from collections.abc import Set
from functools import cache

from .models import Spec
from .request import Request
from .sampling import FEW_STEP
from .timeline import FRAME_1, ends_at_frame_1

log = logging.getLogger(__name__)


def warn_untrained(request: Request, spec: Spec, vocabulary: Set[str], adapted: bool) -> None:
    """Warns when a request uses words, a size or a sampler the model was not trained for.

    An empty `vocabulary` means any word. `adapted` models have a LoRA merged.
    """
    if FEW_STEP in request.sampling.fast and not adapted:
        warn_once(f"{FEW_STEP} is for a consistency model, and no LoRA that makes this one such is merged: expect a poor video")
    if not spec.unet.fps_condition and request.sampling.fps_condition != type(request.sampling).fps_condition:
        warn_once(f"model {spec.name} has no frame-rate condition: {request.sampling.fps_condition} changes nothing")
    if not vocabulary:
        return
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)*", " ".join([*request.states, request.negative, *request.negatives]).lower())
    unknown = ", ".join(repr(word) for word in dict.fromkeys(words) if word not in vocabulary)
    if unknown:
        warn_once(f"model {spec.name} never saw {unknown}: it ignores such words; its model card lists the ones it knows")
    if request.size != spec.size:
        own, asked = ("{}x{}".format(*size) for size in (spec.size, request.size or ()))
        warn_once(f"model {spec.name} was trained on {own}; at {asked} videos may look wrong")


def warn_placed(request: Request) -> None:
    """Warns when a held last state fills the video from its second frame on."""
    if request.mode == "hold" and len(request.at) > 1 and ends_at_frame_1(request.at, request.frames):
        warn_once(f"{FRAME_1}: state {len(request.at)} fills the video from there")


@cache
def warn_once(message: str) -> None:
    log.warning(message)
