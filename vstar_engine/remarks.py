"""What a model was not trained for, said once: words outside its vocabulary, another size than its own."""

import logging
import re
from collections.abc import Set
from functools import cache

from .config import Request, Spec

log = logging.getLogger(__name__)


def remark(request: Request, spec: Spec, vocabulary: Set[str]) -> None:
    """Warns of a request (size filled in) to a model of so many words; one that may know any, with an empty set, gets none."""
    if not vocabulary:
        return
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)*", " ".join([*request.states, request.negative, *request.negatives]).lower())
    unknown = ", ".join(repr(word) for word in dict.fromkeys(words) if word not in vocabulary)
    if unknown:
        _warn(f"model {spec.name} never saw {unknown}: such words say nothing to it; its model card lists those it knows")
    if request.size != spec.size:
        own, asked = ("{}x{}".format(*size) for size in (spec.size, request.size or ()))
        _warn(f"model {spec.name} was trained on {own}; at {asked} a scene may come out odd")


@cache
def _warn(message: str) -> None:
    log.warning(message)
