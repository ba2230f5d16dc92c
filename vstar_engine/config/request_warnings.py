"""What a model was not trained for, said once: few steps, words outside its vocabulary, another size than its own."""

import logging
import re
from collections.abc import Set
from functools import cache

from .models import Spec
from .request import Request
from .sampling import FEW_STEP

log = logging.getLogger(__name__)


def remark(request: Request, spec: Spec, vocabulary: Set[str], adapted: bool) -> None:
    """Warns of a request (size filled in) to a model of so many words, any where the set is empty; `adapted`: by a LoRA."""
    if FEW_STEP in request.sampling.fast and not adapted:
        warn_once(f"{FEW_STEP} is for a consistency model, and no LoRA that makes this one such is merged: expect a poor video")
    if not vocabulary:
        return
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)*", " ".join([*request.states, request.negative, *request.negatives]).lower())
    unknown = ", ".join(repr(word) for word in dict.fromkeys(words) if word not in vocabulary)
    if unknown:
        warn_once(f"model {spec.name} never saw {unknown}: such words say nothing to it; its model card lists those it knows")
    if request.size != spec.size:
        own, asked = ("{}x{}".format(*size) for size in (spec.size, request.size or ()))
        warn_once(f"model {spec.name} was trained on {own}; at {asked} a scene may come out odd")


@cache
def warn_once(message: str) -> None:
    log.warning(message)
