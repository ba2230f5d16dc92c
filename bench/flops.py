"""Floating-point operations of one forward, counted on the meta device, and the kinds of block they fall to."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vstar_engine.config import UNetSpec
from vstar_engine.unet import Downsample, ResBlock, SpatialTransformer, TemporalConvBlock, TemporalTransformer, UNet, Upsample

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


def without_inner(whole: float, by_kind: Mapping[str, float]) -> dict[str, float]:
    """Takes from each kind what the kinds inside it count too; "rest" is what no block counts (stem, head, joins)."""
    own = dict(by_kind)
    own["resblock"] -= own["temporal_conv"]
    return {**own, "rest": whole - sum(own.values())}


def _temporal_attention_flops(q: Sequence[int], k: Sequence[int], *_: object, **__: object) -> int:
    batch, frames, positions, heads, head_dim = q
    return 4 * batch * positions * heads * head_dim * frames * k[1]


def count(spec: UNetSpec, inputs: Sequence[Tensor]) -> dict[str, float]:
    """Gives the FLOPs (two a multiply-add) of one forward by kind of block, and under "whole" their sum."""
    with torch.device("meta"):
        unet = UNet(spec).to(inputs[0].dtype)
    formulas = {torch.ops.vstar.temporal_attention: _temporal_attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with counter, torch.no_grad():
        unet(*(x.to("meta") for x in inputs))
    modules = counter.get_flop_counts()
    by_kind = dict.fromkeys([*KINDS.values(), "init_attn"], 0.0)
    for name, kind in block_kinds(unet).items():
        by_kind[kind] += sum(modules.get(f"UNet.{name}", {}).values())
    whole = counter.get_total_flops()
    return {**without_inner(whole, by_kind), "whole": whole}
