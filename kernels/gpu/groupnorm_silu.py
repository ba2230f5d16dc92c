"""Triton kernels of `vstar::groupnorm_silu` on (items, rows, channels): measure, settle, normalise.

A program of `measure_kernel` takes a tile of rows x channels of one item in registers and writes each channel's mean and sum of
squared distances from it, two passes over what it holds. One of `settle_kernel` joins a group's, again in two passes, to a mean
and a gain for each channel, a few kilobytes in all. One of `normalise_kernel` reads a tile again and writes
silu((x - mean) * gain + bias). Sums are in a fixed order: the same input gives the same bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# a tile's rows and channels: 16-byte accesses of half precision for each of 256 threads, two of each
ROWS, CHANNELS, WARPS = 64, 64, 8
# blocks of rows whose moments a program of `settle_kernel` reads at a time
BLOCKS = 32


@triton.jit
def _tile(item, block, part, rows, channels, R: tl.constexpr, C: tl.constexpr):
    """Returns a tile's places in x, which of them are inside, its rows and its channels."""
    r = block * R + tl.arange(0, R)
    c = part * C + tl.arange(0, C)
    place = (item.to(tl.int64) * rows + r.to(tl.int64))[:, None] * channels + c[None, :]
    return place, (r < rows)[:, None] & (c < channels)[None, :], r, c


@triton.jit(do_not_specialize=("blocks", "rows"))
def measure_kernel(x, moments, rows, channels, blocks, R: tl.constexpr, C: tl.constexpr):
    """moments (items, blocks, 2, channels) float32: means, then sums of squared distances."""
    item, block, part = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    place, inside, r, c = _tile(item, block, part, rows, channels, R, C)
    tile = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(tile, 0) / tl.minimum(R, rows - block * R).to(tl.float32)
    off = tl.where((r < rows)[:, None], tile - mean[None, :], 0.0)
    to = moments + (item * blocks + block).to(tl.int64) * 2 * channels + c
    tl.store(to, mean, mask=c < channels)
    tl.store(to + channels, tl.sum(off * off, 0), mask=c < channels)


@triton.jit(do_not_specialize=("blocks", "rows"))
def settle_kernel(
    moments, weight, settled, rows, channels, groups, blocks, eps,
    R: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """settled (items, 2, channels) float32: mean, then gain. One program for each item and group of SIZE channels."""
    item, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    c = tl.arange(0, PADDED)
    channel = group * SIZE + c
    moments += item.to(tl.int64) * blocks * 2 * channels + channel[None, :]
    total = tl.zeros((BLOCKS, PADDED), tl.float32)
    for first in tl.range(0, blocks, BLOCKS):
        b = first + tl.arange(0, BLOCKS)
        inside = (b < blocks)[:, None] & (c < SIZE)[None, :]
        count = tl.minimum(R, rows - b * R).to(tl.float32)[:, None]
        total += count * tl.load(moments + b.to(tl.int64)[:, None] * 2 * channels, mask=inside, other=0.0)
    elements = rows.to(tl.float32) * SIZE
    mean = tl.sum(tl.sum(total, 0), 0) / elements
    squares = tl.zeros((BLOCKS, PADDED), tl.float32)
    for first in tl.range(0, blocks, BLOCKS):
        b = first + tl.arange(0, BLOCKS)
        inside = (b < blocks)[:, None] & (c < SIZE)[None, :]
        count = tl.minimum(R, rows - b * R).to(tl.float32)[:, None]
        place = moments + b.to(tl.int64)[:, None] * 2 * channels
        off = tl.load(place, mask=inside, other=0.0) - mean
        squares += tl.where(inside, tl.load(place + channels, mask=inside, other=0.0) + count * off * off, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(tl.sum(squares, 0), 0) / elements + eps)
    gain = tl.load(weight + channel, mask=c < SIZE, other=0.0).to(tl.float32) * scale
    settled += item.to(tl.int64) * 2 * channels + channel
    tl.store(settled, mean + tl.zeros((PADDED,), tl.float32), mask=c < SIZE)
    tl.store(settled + channels, gain, mask=c < SIZE)


@triton.jit(do_not_specialize=("blocks", "rows"))
def normalise_kernel(x, settled, bias, out, rows, channels, blocks, R: tl.constexpr, C: tl.constexpr, SILU: tl.constexpr):
    item, block, part = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    place, inside, _, c = _tile(item, block, part, rows, channels, R, C)
    settled += item.to(tl.int64) * 2 * channels + c
    mean = tl.load(settled, mask=c < channels, other=0.0)[None, :]
    gain = tl.load(settled + channels, mask=c < channels, other=0.0)[None, :]
    add = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    y = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean) * gain + add
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


def settle_constants(channels: int, groups: int) -> dict[str, Any]:
    """Returns the values that `settle_kernel` is compiled for."""
    size = channels // groups
    return {"R": ROWS, "SIZE": size, "PADDED": triton.next_power_of_2(size), "BLOCKS": BLOCKS}


def groupnorm_silu_triton(rows: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """Launches on contiguous rows (N, ..., C); float16, bfloat16 and float32."""
    items, channels = rows.shape[0], rows.shape[-1]
    count = rows.numel() // items // channels
    blocks, parts = triton.cdiv(count, ROWS), triton.cdiv(channels, CHANNELS)
    moments = torch.empty(items, blocks, 2, channels, dtype=torch.float32, device=rows.device)
    settled = torch.empty(items, 2, channels, dtype=torch.float32, device=rows.device)
    out = torch.empty_like(rows)
    tile = {"R": ROWS, "C": CHANNELS, "num_warps": WARPS}
    with torch.cuda.device_of(rows):
        measure_kernel[(items * blocks, parts)](rows, moments, count, channels, blocks, **tile)
        shape = (count, channels, groups, blocks, eps)
        settle_kernel[(items * groups,)](moments, weight, settled, *shape, **settle_constants(channels, groups))
        normalise_kernel[(items * blocks, parts)](rows, settled, bias, out, count, channels, blocks, **tile, SILU=silu)
    return out
