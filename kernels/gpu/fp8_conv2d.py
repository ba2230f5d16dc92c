"""Triton kernel of `vstar::conv_e4m3`: a matrix product whose rows are the windows of an image, read where they lie.

A program computes a tile of positions x channels. Its sum runs over the kernel's taps and, within a tap, over the input
channels; loads beyond the border are masked to zeros. Programs that share positions or weights run near one another.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vstar_engine.kernels.problems import Fp8ConvProblem

from .linear import GROUP, Tile, place_of
from .temporal_attention_launch import nearest

# no row was timed on a GPU: they fit the registers and the shared memory, and `autotune` tries them out where they run
_ADA = (Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 4))
_HOPPER = (Tile(128, 128, 128, 8, 4), Tile(128, 128, 64, 8, 6), Tile(128, 64, 128, 4, 4))
_BLACKWELL = (Tile(128, 256, 128, 8, 3), *_HOPPER)
TILES: dict[int, tuple[Tile, ...]] = {89: _ADA, 90: _HOPPER, 100: _BLACKWELL, 120: _ADA}
# Hopper's tensor cores sum e4m3 products in fewer bits than float32 has: after so many a sum goes over into float32
WITHIN = 128


# one compiled kernel serves every value of these
SCALARS = ("rows", "height", "width", "out_height", "out_width", "taps", "aside", "stride", "above", "before")


@triton.jit(do_not_specialize=SCALARS)
def conv_e4m3_kernel(
    x, weight, step, scale, bias, out, rows, height, width, in_channels, out_height, out_width, out_channels,
    taps, aside, stride, above, before,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    WITHIN: tl.constexpr,
):  # fmt: skip
    """x (N, height, width, in_channels), weight (out_channels, taps / aside, aside, in_channels), out (rows, out_channels).

    There are N * out_height * out_width rows. `above` and `before` are the zeros that pad an image's top and left.
    EVEN: `in_channels` is a multiple of K.
    """
    block, part = place_of(rows, out_channels, M, N, GROUP)
    r, n, k = block * M + tl.arange(0, M), part * N + tl.arange(0, N), tl.arange(0, K)
    # beyond the end the last row and column are computed again, and not stored
    row, column = tl.minimum(r, rows - 1), tl.minimum(n, out_channels - 1)
    image, place = row // (out_height * out_width), row % (out_height * out_width)
    top, left = place // out_width * stride - above, place % out_width * stride - before
    windows = x + ((image.to(tl.int64) * height + top) * width + left)[:, None] * in_channels + k[None, :]
    weights = weight + column.to(tl.int64)[None, :] * taps * in_channels + k[:, None]
    total = tl.zeros((M, N), tl.float32)
    # the tap's place in the kernel, and the first of the channels that are summed: counted on, as to divide would cost more
    y, z, start = 0, 0, 0
    for _ in tl.range(0, taps * tl.cdiv(in_channels, K), num_stages=STAGES):
        inside = (start + k < in_channels) | EVEN
        there = (top + y >= 0) & (top + y < height) & (left + z >= 0) & (left + z < width)
        a = tl.load(windows + (y * width + z) * in_channels + start, mask=there[:, None] & inside[None, :], other=0.0)
        b = tl.load(weights + (y * aside + z) * in_channels + start, mask=inside[:, None], other=0.0)
        total = tl.dot(a, b, total, max_num_imprecise_acc=WITHIN)
        start += K
        done = start >= in_channels
        start, z = tl.where(done, 0, start), tl.where(done, z + 1, z)
        y, z = tl.where(z == aside, y + 1, y), tl.where(z == aside, 0, z)
    total *= tl.load(step) * tl.load(scale)
    total += tl.load(bias + column).to(tl.float32)[None, :]
    stored = (r < rows)[:, None] & (n < out_channels)[None, :]
    tl.store(out + r.to(tl.int64)[:, None] * out_channels + n[None, :], total.to(out.dtype.element_ty), mask=stored)


def tiles(arch: int) -> tuple[Tile, ...]:
    """Returns the rows of the launch table for an architecture that has e4m3."""
    if arch < min(TILES):
        raise ValueError(f"FP8 needs compute capability 8.9 or newer, got {arch / 10}")
    return TILES[nearest(arch)]


def constants(tile: Tile, in_channels: int) -> dict[str, Any]:
    """Returns the values that `conv_e4m3_kernel` is compiled for."""
    shape = {"M": tile.rows, "N": tile.columns, "K": tile.depth, "GROUP": GROUP, "STAGES": tile.stages}
    return {**shape, "EVEN": in_channels % tile.depth == 0, "WITHIN": min(WITHIN, tile.depth)}


def conv_e4m3_triton(problem: Fp8ConvProblem, tile: Tile) -> Tensor:
    """Launches the kernel at one tile of the table."""
    x, weight, step, scale, bias, stride, padding = problem.contiguous()
    (images, height, width, in_channels), (out_channels, *kernel) = x.shape, weight.shape[:3]
    out_height, out_width = problem.out_shape[1:3]
    rows, out = images * out_height * out_width, bias.new_empty(problem.out_shape)
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(out_channels, tile.columns)
    with torch.cuda.device_of(x):
        conv_e4m3_kernel[(programs,)](
            x, weight, step, scale, bias, out, rows, height, width, in_channels, out_height, out_width, out_channels,
            kernel[0] * kernel[1], kernel[1], stride, *padding, **constants(tile, in_channels), num_warps=tile.warps,
        )  # fmt: skip
    return out
