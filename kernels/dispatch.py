"""Which tensors Triton's kernels serve, and when an op gives way to PyTorch's own operators."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def triton_serves(x: Tensor) -> bool:
    """Returns whether Triton computes on x: on a GPU, and to be tested also on the CPU, in Triton's interpreter."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    return x.dtype != torch.float64 and (x.is_cuda or interpreting)


_kept = False


@contextmanager
def kept() -> Iterator[None]:
    """What is traced meanwhile keeps the project's ops: for a package, which runs where they are registered."""
    global _kept
    _kept = True
    try:
        yield
    finally:
        _kept = False


def decomposed() -> bool:
    """Returns whether a graph is being traced which shall hold PyTorch's own operators alone."""
    return torch.compiler.is_compiling() and not _kept
