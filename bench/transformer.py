"""The temporal transformer as a module against the published one's passes, with the same weights, on this CPU.

The published passes copy to (B * P, T, C) and back, project q, k and v apart, copy the heads out and in, and materialise the
logits, the bias, two softmaxes and the head mean.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from vstar_engine.config import TAR_PRESETS
from vstar_engine.tar import table
from vstar_engine.unet import TemporalTransformer

from .kernels import published
from .rows import Rows
from .seeded import relative_error
from .timing import interleave

LEVELS = {0: (320, 40, 64), 1: (640, 20, 32), 2: (1280, 10, 16)}
REHEARSED = {0: (64, 4, 6)}
ERROR_BUDGET = 1e-5


def published_attention(attention: Any, x: Tensor, g: Tensor) -> Tensor:
    """x (B * P, T, C): three projections, the published core, the output projection."""
    heads = (linear(x, weight).unflatten(-1, (attention.heads, -1))[None] for weight in attention.to_qkv.weight.chunk(3))
    q, k, v = (part.transpose(1, 2) for part in heads)  # (1, T, B * P, heads, head_dim)
    out = published(q, k, v, g)[0].flatten(-2).transpose(0, 1)
    return linear(out, attention.to_out[0].weight, attention.to_out[0].bias)


def published_transformer(module: Any, x: Tensor, g: Tensor) -> Tensor:
    """Runs `module`'s weights on x (B, C, T, H, W) by the published passes."""
    batch, _, frames, height, width = x.shape
    h = module.norm(x).permute(0, 3, 4, 2, 1).flatten(0, 2).contiguous()
    h = linear(h, module.proj_in.weight.flatten(1), module.proj_in.bias)
    for block in module.transformer_blocks:
        h = published_attention(block.attn1, block.norm1(h), g) + h
        h = published_attention(block.attn2, block.norm2(h), g) + h
        gate, out = block.ff.net[0].proj, block.ff.net[2]
        value, gated = linear(block.norm3(h), gate.weight, gate.bias).chunk(2, dim=-1)
        h = linear(value * torch.nn.functional.gelu(gated), out.weight, out.bias) + h
    h = linear(h, module.proj_out.weight.flatten(1), module.proj_out.bias)
    return h.view(batch, height, width, frames, -1).permute(0, 4, 3, 1, 2).contiguous() + x


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the lengths and the conditions."""
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append a row per variant to this file")
    parser.add_argument("--rehearse", action="store_true", help="one tiny level, two rounds")
    parser.add_argument("--frames", type=int, nargs="+", default=[16], help="default %(default)s")
    parser.add_argument("--batch", type=int, default=2, help="default %(default)s")
    parser.add_argument("--head-dim", type=int, default=64, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Measures what the flags say; 1 if the two disagree."""
    rows, levels = Rows(args.out), REHEARSED if args.rehearse else LEVELS
    torch.manual_seed(0)
    for frames in args.frames:
        for level, (channels, height, width) in levels.items():
            module = TemporalTransformer(channels, channels // args.head_dim, args.head_dim).eval()
            x = torch.randn(args.batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)  # channels-last
            g = table(TAR_PRESETS["64D1_32D8"], len(LEVELS), frames, step=0)[:, level]
            variants: dict[str, Callable[[], Tensor]] = {
                "ours": partial(module, x, g),
                "published passes": partial(published_transformer, module, x.contiguous(), g),
            }
            params = {"level": level, "channels": channels, "size": (height, width), "frames": frames, "batch": args.batch}
            name = f"temporal_transformer/{frames}f/level {level}"
            error = relative_error(variants["ours"](), variants["published passes"]())
            if not error <= ERROR_BUDGET:
                rows.fail(name, params, f"the two disagree by {error:.1e} relative L2")
                continue
            timings = interleave(variants, 2 if args.rehearse else args.rounds, warmup=1)
            for variant, timing in timings.items():
                ratio = timing.median / timings["ours"].median
                numbers = {"seconds": timing.median, "p20": timing.p20, "p80": timing.p80, "times ours": ratio, "error": error}
                rows.write(f"{name}/{variant}", params, numbers)
    return 1 if rows.failures else 0
