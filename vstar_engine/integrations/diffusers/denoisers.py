"""Finds a pipeline's denoisers and their attention layers, and refuses those that a dial cannot be put on."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

NAMES = ("unet", "transformer", "transformer_2")
UNET3D, MOTION, WAN = "UNet3DConditionModel", "UNetMotionModel", "WanTransformer3DModel"
FAMILIES = (UNET3D, MOTION, WAN)
# what these compute is the same; ours computes it too
PLAIN_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "WanAttnProcessor",
    "WanAttnProcessor2_0",
)
ATTENTIONS = {UNET3D: "Attention", MOTION: "Attention", WAN: "WanAttention"}


@dataclass(frozen=True)
class Layer:
    """One attention of a denoiser: its path, its module, and its level (0 is the finest; None in a transformer)."""

    path: str
    module: nn.Module
    level: int | None = None


@dataclass(frozen=True)
class Denoiser:
    """One denoising network of a pipeline; `family` is its class in diffusers."""

    name: str
    module: nn.Module
    family: str

    @property
    def levels(self) -> int:
        """Returns how many resolutions a UNet has."""
        return len(self.module.down_blocks)  # type: ignore[arg-type]


def denoisers(pipe: object) -> list[Denoiser]:
    """Returns the denoisers of a pipeline, or the one that was given. Raises ValueError for classes that are not known."""
    found = {"model": pipe} if isinstance(pipe, nn.Module) else {name: getattr(pipe, name, None) for name in NAMES}
    modules = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    if not modules:
        raise ValueError(f"{type(pipe).__name__} has no denoiser: none of {', '.join(NAMES)} is there")
    return [_denoiser(name, module) for name, module in modules.items()]


def _denoiser(name: str, module: nn.Module) -> Denoiser:
    if hasattr(module, "_orig_mod") or any(part._compiled_call_impl is not None for part in module.modules()):
        raise ValueError(f"{name} is compiled: put the dial on first, then compile")
    kind = type(module).__name__
    if kind not in FAMILIES:
        raise ValueError(f"{name} is a {kind}, and dials are known for {', '.join(FAMILIES)}")
    if getattr(module, "_parallel_config", None) is not None:
        raise ValueError(
            f"{name} runs under context parallelism: a processor would see some of the tokens without knowing which"
        )
    if getattr(module, "is_cache_enabled", False):
        raise ValueError(
            f"{name} caches between steps, which a dial that changes between them would spoil: disable_cache() first"
        )
    return Denoiser(name, module, kind)


def temporal_layers(denoiser: Denoiser) -> Iterator[Layer]:
    """Yields the temporal self-attentions of a UNet with their levels; not the stem's, which is never regularised."""
    inside = re.compile(r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(?:temp_attentions|motion_modules)\..*\.attn[12]$")
    for path, module in denoiser.module.named_modules():
        found = inside.match(path)
        if found is None:
            continue
        part, index = found[1], int(found[2] or 0)
        level = {"down_blocks": index, "up_blocks": denoiser.levels - 1 - index}.get(part, denoiser.levels - 1)
        yield Layer(path, module, level)


def frame_layers(denoiser: Denoiser) -> Iterator[Layer]:
    """Yields a video transformer's self-attentions."""
    for path, module in denoiser.module.named_modules():
        if re.fullmatch(r"blocks\.\d+\.attn1", path):
            yield Layer(path, module)


def text_layers(denoiser: Denoiser) -> Iterator[Layer]:
    """Yields the attentions to the text; a motion module's `attn2` is none."""
    where = (
        r"blocks\.\d+\.attn2" if denoiser.family == WAN else r".*\.?(?<!temp_)attentions\.\d+\.transformer_blocks\.\d+\.attn2"
    )
    for path, module in denoiser.module.named_modules():
        if re.fullmatch(where, path):
            yield Layer(path, module)


def check_layer(layer: Layer, denoiser: Denoiser) -> None:
    """Raises ValueError for an attention that computes something else than plain attention, or is taken already."""
    module, where = layer.module, f"{denoiser.name}.{layer.path}"
    if type(module).__name__ != ATTENTIONS[denoiser.family]:
        raise ValueError(f"{where} is a {type(module).__name__}, where {ATTENTIONS[denoiser.family]} is known")
    processor = module.processor
    if hasattr(processor, "inner"):
        raise ValueError(f"{where} has a dial or a timeline already: take that off first, or give its settings in one call")
    if getattr(module, "fused_projections", False):
        raise ValueError(f"{where} has fused projections: unfuse them first (unfuse_qkv_projections)")
    if type(processor).__name__ not in PLAIN_PROCESSORS:
        raise ValueError(
            f"{where} runs {type(processor).__name__}, which is not known; known are {', '.join(PLAIN_PROCESSORS)}"
        )
    own = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross")
    if denoiser.family != WAN and any(getattr(module, name, None) for name in own):
        raise ValueError(f"{where} normalises inside its attention, which the UNets that are known do not")
    if getattr(processor, "_parallel_config", None) is not None:
        raise ValueError(f"{where} runs under context parallelism: a processor would see some of the tokens alone")
