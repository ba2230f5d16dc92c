"""PyTorch's settings of the program around us: a default device and autocast, kept out of what we compute."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Made = TypeVar("Made")


@contextmanager
def kept_out() -> Iterator[None]:
    """Takes the default device and autocast of the program around us away inside the block, for this thread alone.

    The same seed gives the same video then. A default dtype belongs to the whole process: our code states its own instead.
    """
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def undisturbed(work: Callable[Given, Made]) -> Callable[Given, Made]:
    """Decorates a function to run under PyTorch's own defaults, whatever the host program has set."""

    @wraps(work)
    def wrapped(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        with kept_out():
            return work(*args, **kwargs)

    return wrapped
