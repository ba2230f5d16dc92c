"""The UNet in eager PyTorch; on a GPU each shape of a sampling step around it is recorded once as a CUDA graph."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from vstar_engine.config.models import Spec, UNetSpec
from vstar_engine.networks.denoiser import Denoiser
from vstar_engine.networks.layers import CrossAttention
from vstar_engine.networks.precomputed import CachedFeatures, ContextKV
from vstar_engine.networks.step import Conditioning, NetworkCall, SamplingStep, StepInputs
from vstar_engine.networks.streaming_unet import StreamingUNet
from vstar_engine.networks.unet import UNet
from vstar_engine.weights import checkpoint, key_map

from .cuda_graphs import Recent, Recording


def load(
    spec: Spec,
    weights: Mapping[str, Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
    spatial_attention: str = "auto",
    graphs: bool = True,
) -> UNet | StreamingUNet:
    """Builds the UNet, or a streaming model's network, and fills it from official names.

    On a GPU, where `graphs`, the steps of a UNet replay CUDA graphs.
    """
    if device.type == "cuda":
        # the same few convolutions run in every step, so trying their algorithms out once pays
        torch.backends.cudnn.benchmark = True
    with torch.device("meta"):
        # a chunk's known frames are no input of a recorded step, so streaming records none
        unet = StreamingUNet(spec, spatial_attention) if spec.streaming else kind(device, graphs)(spec.unet, spatial_attention)
    checkpoint.load(unet, weights, key_map.UNET, device=device, dtype=dtype)
    return unet.eval().requires_grad_(False)


def kind(device: torch.device, graphs: bool = True) -> type[UNet]:
    """Returns the class of network for a device: RecordedUnet on a GPU with `graphs`, else UNet."""
    return RecordedUnet if graphs and device.type == "cuda" else UNet


class StaticStep:
    """A step of one shape whose inputs have fixed addresses, and its recording."""

    def __init__(self, unet: "RecordedUnet", step: SamplingStep):
        # tensors made outside inference mode may be written inside it and outside
        with torch.inference_mode(False):
            inputs = StepInputs(*map(blank_like, step.inputs))
            kept = replace(step, inputs=inputs, calls=tuple(map(unet.blank, range(len(step.calls)), step.calls)))
        self.kept = kept
        # the closure holds no self: a dropped recording frees its memory without waiting for the garbage collector
        self.recording = Recording(lambda: Denoiser.run_step(unet, kept), unet.device, pool=unet.pool)

    def __call__(self, unet: UNet, step: SamplingStep) -> tuple[Tensor, ...]:
        for mine, theirs in zip(self.kept.inputs, step.inputs, strict=True):
            if mine is not None and theirs is not None:
                mine.copy_(theirs)
        for mine_of, call in zip(self.kept.calls, step.calls, strict=True):
            if mine_of.conditioning.contexts is not call.conditioning.contexts:
                context_kv = mine_of.conditioning.prepared(unet.prepare_context)
                for part, kv in unet.project_context(call.conditioning.contexts):
                    context_kv.kv[part].copy_(kv)
                mine_of.conditioning.contexts = call.conditioning.contexts
            if call.cached is not None and call.cached.features is not None:
                assert mine_of.cached is not None
                assert mine_of.cached.features is not None
                mine_of.cached.features.copy_(call.cached.features)
        # the next step writes the same memory
        return tuple(made.clone() for made in self.recording())


class RecordedUnet(UNet):
    """A UNet on a GPU whose sampling steps are recorded for each shape.

    A graph reads parameters at their recorded addresses: call `forget_graphs` before you replace them. Direct calls of the
    network are not recorded, nor are steps that need gradients or whose modules have hooks.
    """

    records_steps = True

    def __init__(self, spec: UNetSpec, spatial_attention: str = "auto"):
        super().__init__(spec, spatial_attention)
        self.recent: Recent[tuple[object, ...], StaticStep] = Recent()
        self.pool: object = None
        # K and V by a call's place in a step and its context's shape; all recordings read the same ones
        self.conditionings: WeakValueDictionary[tuple[object, ...], Conditioning] = WeakValueDictionary()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def graph_bytes(self) -> int:
        return sum(fixed.recording.nbytes for fixed in self.recent.values())

    def forget_graphs(self) -> bool:
        had = bool(self.recent)
        vars(self).pop("_parts", None)
        self.recent.clear()
        self.pool = None
        if had:
            torch.cuda.empty_cache()
        return had

    def run_step(self, step: SamplingStep) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() or self._watched():
            return super().run_step(step)
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        return self.recent.take(shape_of(step), lambda: StaticStep(self, step))(self, step)

    def blank(self, place: int, call: NetworkCall) -> NetworkCall:
        """Returns a copy of the call at a place of a step, with uninitialised tensors of its own."""
        key, cached = (place, call.conditioning.shape, call.conditioning.contexts[0].dtype), call.cached
        # the local name keeps it alive until the call holds it
        conditioning = self.conditionings.get(key) or self._blank_conditioning(call.conditioning)
        self.conditionings[key] = conditioning
        if cached is not None and cached.features is not None:
            cached = CachedFeatures(cached.stages, torch.empty_like(cached.features))
        return NetworkCall(call.rows, conditioning, cached)

    def _blank_conditioning(self, like: Conditioning) -> Conditioning:
        """Returns uninitialised K and V for contexts of a shape."""
        batch, frames, length, _ = like.shape
        kv: dict[nn.Module, Tensor] = {
            part: like.contexts[0].new_empty(batch * frames, length, part.to_kv.out_features)
            for part in self.modules()
            if isinstance(part, CrossAttention)
        }
        return Conditioning((), ContextKV(like.shape, kv))

    def _apply(self, *given: Any, **named: Any) -> Self:
        self.forget_graphs()
        return super()._apply(*given, **named)

    @cached_property
    def _parts(self) -> tuple[nn.Module, ...]:
        return tuple(self.modules())

    def _watched(self) -> bool:
        return any(part._forward_hooks or part._forward_pre_hooks for part in self._parts)


def blank_like(x: Tensor | None) -> Any:
    """Returns an uninitialised contiguous tensor of the same shape and dtype, or None for none."""
    return None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def shape_of(step: SamplingStep) -> tuple[object, ...]:
    """Returns the key of a recorded step: dtype, shapes of inputs, and the rows, context and cached features of each call."""
    calls = [
        (call.rows, call.conditioning.shape, call.cached and (call.cached.stages, call.cached.features is not None))
        for call in step.calls
    ]
    return step.dtype, *(None if x is None else (tuple(x.shape), x.dtype) for x in step.inputs), *calls
