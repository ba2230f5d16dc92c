"""Where one forward's arithmetic and time go, by kind of block."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vstar_engine.config.models import UNetSpec
from vstar_engine.networks.blocks import ResBlock, SpatialTransformer, TemporalConvBlock, TemporalTransformer
from vstar_engine.networks.layers import Downsample, Upsample
from vstar_engine.networks.unet import UNet

from .timing import Mark, mark, seconds_between, summarise, synchronize

KINDS = {
    ResBlock: "resblock",
    TemporalConvBlock: "temporal_conv",
    SpatialTransformer: "spatial_transformer",
    TemporalTransformer: "temporal_transformer",
    Downsample: "resample",
    Upsample: "resample",
}


def block_kinds(unet: UNet) -> dict[str, str]:
    """Maps the names of the UNet's blocks to their kinds; the stem's temporal transformer is a kind of its own."""
    kinds = {name: KINDS[type(module)] for name, module in unet.named_modules() if type(module) in KINDS}
    return {name: "init_attn" if name.startswith("init_attn") else kind for name, kind in kinds.items()}


def by_kind(whole: float, blocks: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Sums blocks by kind, each without the blocks inside it; "rest" is what no block holds (stem, head, joins)."""
    sums = dict.fromkeys([*KINDS.values(), "init_attn"], 0.0)
    for kind, amount in blocks:
        sums[kind] += amount
    sums["resblock"] -= sums["temporal_conv"]
    return {**sums, "rest": whole - sum(sums.values())}


def _temporal_attention_flops(q: Sequence[int], k: Sequence[int], *_: object, **__: object) -> int:
    batch, frames, positions, heads, head_dim = q
    return 4 * batch * positions * heads * head_dim * frames * k[1]


def _linear_flops(x: Sequence[int], weight: Sequence[int], *_: object, **__: object) -> int:
    return 2 * math.prod(x) * weight[0]


def flop_counter() -> Any:
    """Returns PyTorch's counter of FLOPs, which also knows our ops; loaded when needed, since with it comes Triton."""
    from torch.utils.flop_counter import FlopCounterMode

    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.vstar.temporal_attention: _temporal_attention_flops,
        torch.ops.vstar.linear: _linear_flops,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def count_flops(spec: UNetSpec, inputs: Sequence[Tensor]) -> dict[str, float]:
    """Returns the FLOPs (two a multiply-add) of one forward by kind of block, and under "whole" their sum."""
    with torch.device("meta"):
        unet = UNet(spec).to(inputs[0].dtype)
    counter = flop_counter()
    with counter, torch.no_grad():
        unet(*(x.to("meta") for x in inputs))
    modules = counter.get_flop_counts()
    blocks = [(kind, float(sum(modules.get(f"UNet.{name}", {}).values()))) for name, kind in block_kinds(unet).items()]
    whole = float(counter.get_total_flops())
    return {**by_kind(whole, blocks), "whole": whole}


def profile(unet: UNet, call: Callable[[], object], rounds: int) -> dict[str, float]:
    """Returns the median seconds of a call by kind of block, and under "whole" their sum; marks cost a little."""
    started: dict[str, Mark] = {}
    spans: list[tuple[str, Mark, Mark]] = []

    def enter(name: str, *_: object) -> None:
        started[name] = mark()

    def leave(name: str, kind: str, *_: object) -> None:
        spans.append((kind, started[name], mark()))

    hooks = []
    for name, kind in block_kinds(unet).items():
        module = unet.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(partial(enter, name)))
        hooks.append(module.register_forward_hook(partial(leave, name, kind)))
    runs = []
    for _ in range(rounds):
        spans.clear()
        synchronize()
        start = mark()
        call()
        whole = seconds_between(start, mark())
        blocks = [(kind, seconds_between(*span)) for kind, *span in spans]
        runs.append({**by_kind(whole, blocks), "whole": whole})
    for hook in hooks:
        hook.remove()
    return {kind: summarise([run[kind] for run in runs]).median for kind in runs[0]}
