"""What is to be loaded, and whether it takes what is asked of it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from . import fp8
from .backends import EAGER
from .built import Artifact
from .config import FP8, STEP_CACHE, Request, rows_at_once


@dataclass(frozen=True)
class Choice:
    """What is loaded: as asked for, else as the built engine says, else the defaults."""

    model: str = "videocrafter2"
    weights: str | Path | None = None
    backend: str = EAGER
    device: str = "cpu"
    dtype: str = "float32"

    @staticmethod
    def of(
        artifact: Artifact | None,
        model: str | None,
        weights: str | Path | None,
        backend: str | None,
        device: str | None,
        dtype: str | None,
    ) -> "Choice":
        """Settles each setting; EngineError where one asked for is not the built engine's."""
        asked = {"model": model, "weights": weights, "backend": backend, "device": device, "dtype": dtype}
        given = {name: value for name, value in asked.items() if value is not None}
        if artifact is None:
            return Choice(**given)  # type: ignore[arg-type]
        artifact.check(**{name: given[name] for name in ("model", "backend", "dtype") if name in given})
        own = {name: artifact.identity[name] for name in ("model", "backend", "dtype")}
        own["device"] = "cpu" if artifact.identity["device"].startswith("cpu") else "cuda"
        return Choice(**{**own, "weights": artifact.manifest["weights_path"], **given})


def check_clip(artifact: Artifact, *requests: Request) -> None:
    """Raises EngineError when a built engine does not take the clip of requests (size filled in), or so many at once.

    ValueError where a request wants steps that run a part of the network.
    """
    first = requests[0]
    assert first.size is not None
    if STEP_CACHE in first.sampling.fast:
        raise ValueError(f"{STEP_CACHE} needs the network in eager PyTorch, and {artifact.folder} can only run it whole")
    artifact.check_clip(first.frames, first.size, rows_at_once(requests))


def check_fp8(device: torch.device, dtype: torch.dtype, artifact: Artifact | None, text: bool) -> None:
    """Raises DeviceError where FP8 cannot be multiplied, ValueError where there is no network to convert or no text to try."""
    if artifact is not None:
        raise ValueError(f"{FP8} converts the network in eager PyTorch, and {artifact.folder} computes as it was built")
    if not text:
        raise ValueError(
            f"{FP8} is scaled by what a text does to the network, so it needs the text tower and states, not embeddings"
        )
    fp8.check(device, dtype)
