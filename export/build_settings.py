"""The settings of a build, checked once; they become the identity in the engine's manifest."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from vstar_engine.artifacts.built_engine import MAX_BATCH
from vstar_engine.artifacts.source_hash import engine_hash
from vstar_engine.backends import BACKENDS, EAGER, TENSORRT
from vstar_engine.config.models import Spec, model_named
from vstar_engine.config.request import MAX_FRAMES
from vstar_engine.machine.device import dtype_named

OPSET = 21
# TensorRT tunes a profile for each of these lengths where none are named
TENSORRT_FRAMES = (16, 32, 64, 96, 128)
REFIT = ("no", "yes", "stripped")
COMPATIBILITY = ("exact", "capability", "ampere")
LEVELS = range(6)
# what only some back ends take, and which
ONLY = {
    "opset": ("onnxruntime", *TENSORRT),
    "inline": ("onnxruntime",),
    **dict.fromkeys(("plugin", "workspace", "level"), tuple(TENSORRT)),
    **dict.fromkeys(("refit", "compatibility", "timing_cache"), ("tensorrt",)),
    "targets": ("tensorrt-rtx",),
}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """An engine to build.

    `frames` are ascending lengths to build for, the last the longest that runs; none: any length, or TENSORRT_FRAMES. `size` is
    (height, width) in pixels, None for any. `batch` is the most rows at once. `inline` writes the temporal attention as
    standard operators, for runtimes that know no model-local function. The rest is TensorRT's: which `plugin` serves, at
    most how many MiB of `workspace` a kernel may use, the optimisation `level`, whether `refit` lets weights be swapped
    ("stripped" leaves them out), the `compatibility` with GPUs (this model, its compute capability, or Ampere and all later
    ones), the file that keeps its timings, and the `targets` that TensorRT for RTX prepares for.
    """

    spec: Spec
    backend: str
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    frames: tuple[int, ...] = ()
    size: tuple[int, int] | None = None
    batch: int = MAX_BATCH
    opset: int = OPSET
    inline: bool = False
    plugin: str = "auto"
    workspace: int = 8192
    level: int = 3
    refit: str = "no"
    compatibility: str = "exact"
    timing_cache: Path | None = None
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.backend == EAGER:
            raise ValueError("backend eager runs the weights as they are; there is nothing to build")
        if self.backend not in BACKENDS:
            raise ValueError(f"unknown backend {self.backend!r}; known backends: {', '.join(BACKENDS)}")
        if self.backend in TENSORRT and not self.frames:
            object.__setattr__(self, "frames", TENSORRT_FRAMES)
        for count in self.frames:
            if not 1 <= count <= MAX_FRAMES:
                raise ValueError(f"frames must be 1 to {MAX_FRAMES}, got {count}")
        if list(self.frames) != sorted(set(self.frames)):
            raise ValueError(f"frames must ascend, got {','.join(map(str, self.frames))}")
        if self.size is not None:
            self.spec.check_size(*self.size)
        if not 1 <= self.batch <= MAX_BATCH:
            raise ValueError(f"the batch must be 1 to {MAX_BATCH}, got {self.batch}")
        self._check_tensorrt()

    def _check_tensorrt(self) -> None:
        for field in fields(self):
            if self.backend not in ONLY.get(field.name, BACKENDS) and getattr(self, field.name) != field.default:
                flag, backends = field.name.replace("_", "-"), " and ".join(ONLY[field.name])
                raise ValueError(f"--{flag} is for backend {backends}; {self.backend} has no use for it")
        for name, known in (("refit", REFIT), ("compatibility", COMPATIBILITY), ("level", LEVELS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {getattr(self, name)!r}")
        if self.workspace < 1:
            raise ValueError(f"the workspace must be 1 MiB or more, got {self.workspace}")

    @property
    def cells(self) -> tuple[int, int] | None:
        """Returns the size in latent cells."""
        return None if self.size is None else (self.size[0] // self.spec.vae.factor, self.size[1] // self.spec.vae.factor)

    @property
    def most_frames(self) -> int:
        return max(self.frames, default=MAX_FRAMES)

    @staticmethod
    def of(identity: Mapping[str, Any], device: torch.device) -> "Settings":
        """Returns the settings that an engine was built with."""
        options = {name: value for name, value in identity["options"].items() if name != "targets"}
        return Settings(
            model_named(identity["model"]),
            identity["backend"],
            dtype=dtype_named(identity["dtype"]),
            device=device,
            frames=tuple(identity["frames"]),
            size=None if identity["size"] is None else tuple(identity["size"]),
            batch=identity["batch"],
            targets=tuple(identity["options"].get("targets", ())),
            **options,
        )

    def identity(self, weights: str, machine: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns all that shapes the engine: the weights' hash and what the back end and the builder say."""
        return {
            "model": self.spec.name,
            "backend": self.backend,
            "dtype": str(self.dtype)[6:],
            "frames": list(self.frames),
            "size": None if self.size is None else list(self.size),
            "batch": self.batch,
            "weights": weights,
            "sources": engine_hash(),
            **machine,
            "options": dict(options),
        }


@dataclass(frozen=True)
class Estimate:
    """A rough estimate of a build: seconds, bytes on disk, bytes of memory, and the measurement behind it."""

    seconds: float
    disk: int
    memory: int
    basis: str
