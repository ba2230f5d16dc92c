"""What a dial or a timeline does, layer by layer."""

from dataclasses import dataclass

from torch import Tensor

from vstar_engine.kernels.cpu import library
from vstar_engine.kernels.dispatch import triton_serves


@dataclass(frozen=True)
class LayerReport:
    """One layer: its denoiser, its path, the rule in force and what computes it."""

    denoiser: str
    path: str
    rule: str
    backend: str

    def __str__(self) -> str:
        return f"{self.denoiser}.{self.path}: {self.rule}; {self.backend}"


@dataclass(frozen=True)
class Report:
    """The layers that a dial or a timeline is on, and what it left alone or refused and why."""

    layers: tuple[LayerReport, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*map(str, self.layers), *self.left])


def backend_of(weight: Tensor) -> str:
    """Returns what computes temporal attention on tensors like a layer's weight."""
    if triton_serves(weight):
        return "vstar::temporal_attention, Triton"
    return "vstar::temporal_attention, C++" if library.serves(weight) else "vstar::temporal_attention, PyTorch"


def frame_backend_of(weight: Tensor) -> str:
    """Returns what computes frame attention on tensors like a layer's weight."""
    return f"vstar::frame_attention, {'Triton' if triton_serves(weight) else 'PyTorch in blocks'}"
