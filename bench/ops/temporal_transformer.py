"""The temporal transformer as a module against the published one's passes, with the same weights.

The published passes copy to (B * P, T, C) and back, project q, k and v apart, copy the heads out and in, and materialise the
logits, the bias, two softmaxes and the head mean, which they keep.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, group_norm, linear, scaled_dot_product_attention

from vstar_engine.bench.harness.block_costs import flop_counter
from vstar_engine.bench.harness.ceilings import ceilings
from vstar_engine.bench.harness.contest import Contest, Provider
from vstar_engine.bench.harness.random_networks import relative_error, seeded
from vstar_engine.bench.harness.timing import seconds_of_short
from vstar_engine.config.models import Spec
from vstar_engine.kernels.temporal_attention import toeplitz_bias
from vstar_engine.networks.blocks import TemporalTransformer
from vstar_engine.sampling.tar import toeplitz

from .attention_providers import OURS, check_ours, clean_core, gaussian_on_host, published_core

# relative L2 against the published passes in float64
ERROR_BUDGET = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
# what whole networks are held to, where single layers and ops have float64. One of half precision has float32, whose own error
# (6e-6) is a thousandth of its budget: in float64 the full network is 11 GB of weights alone
WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
# positions compared with float64, from the first to the last
COMPARED = 64
SIGMA = 1.0
PUBLISHED_PASSES, CLEAN_PASSES = NAMES = "published passes", "clean passes"
# q, k, v (N * heads, T, head_dim), heads -> like q
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def as_published(sigma: float | None, keep: dict[str, Tensor], name: str) -> Attend:
    """Attends as published: g rebuilt on the host in every call, the map kept."""

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        bias = None if sigma is None else gaussian_on_host(q.shape[1], sigma, q)
        out, keep[name] = published_core(q, k, v, heads, bias)
        return out

    return attend


def with_hoisted(bias: Tensor | None, keep: dict[str, Tensor], name: str) -> Attend:
    """Attends as published, but that the bias is there."""

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        out, keep[name] = published_core(q, k, v, heads, None if bias is None else bias.to(q.dtype))
        return out

    return attend


def without_waste(bias: Tensor | None) -> Attend:
    """Attends by clean eager passes; where there is no bias, by PyTorch's own attention."""

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        if bias is None:
            return scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return clean_core(q, k, v, bias.to(q.dtype))

    return attend


def attention_by_passes(attention: Any, x: Tensor, attend: Attend) -> Tensor:
    """x (B * P, T, C): three projections, heads copied out, `attend`, heads copied in, the output projection."""
    weights = attention.to_qkv.weight.flatten(1).chunk(3)
    heads = attention.heads
    q, k, v = (linear(x, weight).unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1) for weight in weights)
    out = attend(q, k, v, heads).unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)
    return linear(out, attention.to_out[0].weight, attention.to_out[0].bias)


def transformer_by_passes(module: Any, attend: Attend, x: Tensor, g: Tensor | None = None) -> Tensor:
    """Runs `module`'s weights on x (B, C, T, H, W) by the published passes; `attend` knows g."""
    batch, _, frames, height, width = x.shape
    h = clips_by_passes(module, attend, by_position(module.norm(x)).contiguous())
    return x + h.view(batch, height, width, frames, -1).permute(0, 4, 3, 1, 2)


def by_position(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B * H * W, T, C)."""
    return x.permute(0, 3, 4, 2, 1).flatten(0, 2)


def clips_by_passes(module: Any, attend: Attend, h: Tensor) -> Tensor:
    """Runs all but the norm and the residual around it on (N, T, C), a clip a position."""
    h = linear(h, module.proj_in.weight.flatten(1), module.proj_in.bias)
    for block in module.transformer_blocks:
        h = attention_by_passes(block.attn1, block.norm1(h), attend) + h
        h = attention_by_passes(block.attn2, block.norm2(h), attend) + h
        gate, out = block.ff.net[0].proj, block.ff.net[2]
        value, gated = linear(block.norm3(h), gate.weight, gate.bias).chunk(2, dim=-1)
        h = linear(value * gelu(gated), out.weight, out.bias) + h
    return linear(h, module.proj_out.weight.flatten(1), module.proj_out.bias)


def exact_at(module: Any, attend: Attend, x: Tensor, here: Tensor) -> Tensor:
    """Runs `module`'s weights on some positions of x in float64, the norm over all of it: (len(here), T, C)."""
    wide = copy.deepcopy(module).double()
    channels = group_norm(x.double(), wide.norm.num_groups, wide.norm.weight, wide.norm.bias, wide.norm.eps)
    return by_position(x)[here].double() + clips_by_passes(wide, attend, by_position(channels)[here])


def transformer_contest(
    spec: Spec,
    size: tuple[int, ...],
    level: int,
    frames: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    chosen: Sequence[str] = (),
) -> Contest:
    """Sets the module at one level, on channels-last memory, against the same weights by passes."""
    channels = spec.unet.model_channels * spec.unet.channel_mult[level]
    heads, width = channels // spec.unet.head_dim, spec.unet.head_dim
    groups = spec.unet.norm_groups
    module = seeded(lambda: TemporalTransformer(channels, heads, width, groups=groups), device, dtype)
    height, across = (side // spec.vae.factor >> level for side in size)
    x = torch.randn(batch, frames, height, across, channels, device=device).to(dtype).permute(0, 4, 1, 2, 3)
    g = toeplitz(frames, SIGMA)[None].to(device)
    bias = toeplitz_bias(g, frames, frames)[0]
    positions = batch * height * across
    here = torch.linspace(0, positions - 1, min(COMPARED, positions), device=device).long()
    exact = exact_at(module, without_waste(bias), x, here)

    def error(name: str, answer: Tensor) -> float:
        return relative_error(by_position(answer)[here], exact) if answer.shape == x.shape else math.inf

    kept: dict[str, Tensor] = {}

    def ours() -> Callable[[], Tensor]:
        check_ours(device)
        return partial(module, x, g)

    def passes(attend: Attend) -> Callable[[], Tensor]:
        return partial(transformer_by_passes, module, attend, x.contiguous())

    ways = {
        OURS: ours,
        PUBLISHED_PASSES: lambda: passes(as_published(SIGMA, kept, "map")),
        CLEAN_PASSES: lambda: passes(without_waste(bias)),
    }
    providers = [Provider(name, prepare) for name, prepare in ways.items() if not chosen or name in chosen]
    with flop_counter() as counter:
        module(x, g)
    case = {
        "op": "temporal_transformer",
        "level": level,
        "frames": frames,
        "batch": batch,
        "shape": "x".join(map(str, x.shape)),
    }
    return Contest(
        *("kernels", case, dtype, device, providers),
        error,
        ERROR_BUDGET[dtype],
        float(2 * x.nbytes + sum(parameter.nbytes for parameter in module.parameters())),
        float(counter.get_total_flops()),
        ceilings(device, dtype),
        seconds_of_short,
    )
