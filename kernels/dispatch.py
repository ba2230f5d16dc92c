"""Which tensors Triton's kernels compute, and when an op is traced as PyTorch's own operators."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def triton_serves(x: Tensor) -> bool:
    """Returns whether Triton computes on x: on a GPU or, for tests, in Triton's interpreter on the CPU."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    return x.dtype != torch.float64 and (x.is_cuda or interpreting)


_kept = False


@contextmanager
def kept() -> Iterator[None]:
    """Keeps the project's ops in graphs traced inside the block: a package runs where they are registered."""
    global _kept
    _kept = True
    try:
        yield
    finally:
        _kept = False


def decomposed() -> bool:
    """Returns whether a graph is being traced that must hold PyTorch's own operators alone."""
    return torch.compiler.is_compiling() and not _kept
