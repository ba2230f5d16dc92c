"""Which tensors Triton's kernels serve."""

import os

import torch
from torch import Tensor


def triton_serves(x: Tensor) -> bool:
    """Says whether Triton computes on x: on a GPU, and to be tested also on the CPU, in Triton's interpreter."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    return x.dtype != torch.float64 and (x.is_cuda or interpreting)
