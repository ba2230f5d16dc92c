"""Room for a batch and for decoding beside the CUDA graphs that a denoiser keeps; graphs give way where memory is short."""

import torch

from vstar_engine.config.models import Spec
from vstar_engine.errors import MemoryShortage
from vstar_engine.machine import memory
from vstar_engine.networks.denoiser import Denoiser

from .eager import RecordedUnet


def graph_bytes(denoiser: Denoiser) -> int:
    """Returns the memory that only a denoiser's graphs can use."""
    return denoiser.nbytes if isinstance(denoiser, RecordedUnet) else 0


def records(denoiser: Denoiser) -> bool:
    """Returns whether a denoiser's steps are recorded."""
    return isinstance(denoiser, RecordedUnet)


def forget_graphs(denoiser: Denoiser) -> bool:
    """Returns the memory of a denoiser's graphs back; says whether there were any."""
    return isinstance(denoiser, RecordedUnet) and denoiser.forget()


def check(footprint: memory.Footprint, denoiser: Denoiser, device: torch.device) -> None:
    """Raises MemoryShortage where a batch does not fit, even without the graphs of earlier ones."""
    try:
        memory.check(footprint, device, loaded=True, kept=graph_bytes(denoiser))
    except MemoryShortage:
        if not forget_graphs(denoiser):
            raise
        memory.check(footprint, device, loaded=True)


def frames_at_once(spec: Spec, height: int, width: int, dtype: torch.dtype, denoiser: Denoiser, device: torch.device) -> int:
    """Returns how many frames to decode at once, at least one: as many as pay and fit, without graphs where none would."""

    def fitting() -> int:
        free = memory.available_bytes(device) - graph_bytes(denoiser)
        return memory.frames_at_once(spec, height, width, dtype, free)

    return fitting() or (forget_graphs(denoiser) and fitting()) or 1
