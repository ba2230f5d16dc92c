"""The UNet as a plan of TensorRT for RTX: built on any machine, finished by the GPU that loads it."""

from collections.abc import Mapping
from typing import Any

import torch

from ..built import Artifact
from . import Denoiser
from .tensorrt import library, open_plan


def machine(device: torch.device, options: Mapping[str, Any]) -> dict[str, Any]:
    """Says what an engine depends on: the library's version, and a GPU of its targets, whichever machine built it."""
    return {"device": "cuda", "versions": {"tensorrt-rtx": library("tensorrt-rtx").__version__}}


def load(artifact: Artifact, *, device: torch.device, dtype: torch.dtype) -> Denoiser:
    """As the back end `tensorrt`."""
    return open_plan(library("tensorrt-rtx"), artifact, device, dtype)
