"""The UNet in eager PyTorch; on a GPU each shape of its inputs is recorded once as a CUDA graph."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..config import Spec, UNetSpec
from ..layers import Heard
from ..step_cache import Deep
from ..unet import UNet
from .graphs import Recent, Recording


def load(
    spec: Spec,
    weights: Mapping[str, Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
    spatial_attention: str = "auto",
    graphs: bool = True,
) -> UNet:
    """Builds the UNet and fills it from official names; on a GPU, where `graphs`, its steps replay CUDA graphs."""
    if device.type == "cuda":
        # the same few convolutions run in every step, so trying their algorithms out once pays
        torch.backends.cudnn.benchmark = True
    with torch.device("meta"):
        unet = (RecordedUnet if graphs and device.type == "cuda" else UNet)(spec.unet, spatial_attention)
    checkpoint.load(unet, weights, checkpoint.UNET, device=device, dtype=dtype)
    return unet.eval().requires_grad_(False)


class Fixed:
    """Copies of the inputs of one shape that stay where they are, and the recorded call on them."""

    def __init__(self, unet: "RecordedUnet", given: tuple[Tensor, ...]):
        # made outside inference mode, they may be written in it and elsewhere
        with torch.inference_mode(False):
            kept = tuple(torch.empty(x.shape, dtype=x.dtype, device=unet.device) for x in given)
        # without self in it: what is dropped must not wait for the collector to give its memory back
        self.given, self.recording = kept, Recording(lambda: unet.plainly(*kept), unet.device, pool=unet.pool)

    def __call__(self, given: tuple[Tensor, ...]) -> Tensor:
        for mine, theirs in zip(self.given, given, strict=True):
            mine.copy_(theirs)
        # the next call writes the same memory
        return self.recording().clone()


class RecordedUnet(UNet):
    """The UNet on a GPU, recorded for each shape; what asks for gradients, or hooks into its modules, runs plainly.

    A graph reads parameters where they were: `forget` what was recorded before you replace them.
    """

    def __init__(self, spec: UNetSpec, spatial_attention: str = "auto"):
        super().__init__(spec, spatial_attention)
        self.recent: Recent[tuple[object, ...], Fixed] = Recent()
        self.pool: object = None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def nbytes(self) -> int:
        """Memory that what was recorded keeps from everything else."""
        return sum(fixed.recording.nbytes for fixed in self.recent.values())

    def forget(self) -> bool:
        """Drops what was recorded and gives its memory back; says whether there was anything."""
        had = bool(self.recent)
        vars(self).pop("_parts", None)
        self.recent.clear()
        self.pool = None
        if had:
            torch.cuda.empty_cache()
        return had

    def hear(self, context: Tensor) -> Tensor:
        """Gives texts as they are: their projections would not lie where a graph reads them."""
        return context

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Tensor | Heard,
        fps: Tensor,
        tar: Tensor,
        deep: Deep | None = None,
    ) -> Tensor:
        """As `UNet.forward`; what it gives is the caller's own. A part of the network is not recorded."""
        if deep is not None or isinstance(context, Heard):
            return self.plainly(latents, timestep, context, fps, tar, deep)
        given = latents, timestep, context, fps, tar
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self._watched():
            return self.plainly(*given)
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        key = tuple((tuple(x.shape), x.dtype) for x in given)
        return self.recent.take(key, lambda: Fixed(self, given))(given)

    def plainly(self, *given: Any) -> Tensor:
        """As `UNet.forward`, without a graph."""
        return super().forward(*given)

    def _apply(self, *given: Any, **named: Any) -> Self:
        self.forget()
        return super()._apply(*given, **named)

    @cached_property
    def _parts(self) -> tuple[nn.Module, ...]:
        return tuple(self.modules())

    def _watched(self) -> bool:
        return any(part._forward_hooks or part._forward_pre_hooks for part in self._parts)
