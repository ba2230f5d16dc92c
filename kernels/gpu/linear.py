"""Triton kernels of `vstar::linear` on a GPU: a matrix product that norms its input's rows and ends in bias, residual or gate.

A program of `linear_kernel` computes a tile of the result; programs that share rows or weights run near one another. Rows are
normed on the way to the tensor cores, and bias, residual or gate are applied to the float32 sums, so that only the result is
written. `moments_kernel` takes each row's mean and variance once, in two passes over registers: in the product every tile of
columns would take them again, 8 to 80 times.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vstar_engine.kernels.problems import LinearProblem

from .temporal_attention_launch import nearest

# tiles of rows that share the weights in cache
GROUP = 8
# values that a program of `moments_kernel` holds, and the longest row that one holds
HELD, LONGEST = 4096, 8192
MOMENTS_WARPS = 4


class Tile(NamedTuple):
    """A row of the launch table: rows x columns of the result, what of the sum is loaded at a time, warps, and stages of loads.

    A gated tile has so many columns of values and as many of gates.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# no row was timed on a GPU: they fit the registers and the shared memory, and `autotune` tries them out where they run
_SMALL = Tile(128, 64, 32, 4, 4)
_AMPERE = (Tile(128, 128, 32, 8, 4), _SMALL)
_HOPPER = (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4))
_GATED, _GATED_HOPPER = (Tile(128, 64, 32, 8, 4),), (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 4))
TILES: dict[int, tuple[Tile, ...]] = {**dict.fromkeys((80, 86, 89, 120), _AMPERE), **dict.fromkeys((90, 100), _HOPPER)}
GATED: dict[int, tuple[Tile, ...]] = {**dict.fromkeys((80, 86, 89, 120), _GATED), **dict.fromkeys((90, 100), _GATED_HOPPER)}


@triton.jit
def moments_of(tile, c, in_features, eps):
    """Returns the rows' means, their differences from them (zero beyond the end) and 1 / sqrt(variance + eps)."""
    mean = tl.sum(tile, 1) / in_features
    off = tl.where((c < in_features)[None, :], tile - mean[:, None], 0.0)
    return mean, off, 1.0 / tl.sqrt(tl.sum(off * off, 1) / in_features + eps)


@triton.jit(do_not_specialize=("rows",))
def moments_kernel(x, moments, rows, in_features, eps, R: tl.constexpr, PADDED: tl.constexpr):
    """moments (2, rows) float32: the means of rows of x (rows, in_features), then 1 / sqrt(variance + eps)."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.arange(0, PADDED)
    inside = (r < rows)[:, None] & (c < in_features)[None, :]
    tile = tl.load(x + r.to(tl.int64)[:, None] * in_features + c[None, :], mask=inside, other=0.0).to(tl.float32)
    mean, _, scale = moments_of(tile, c, in_features, eps)
    tl.store(moments + r, mean, mask=r < rows)
    tl.store(moments + rows + r, scale, mask=r < rows)


@triton.jit
def place_of(rows, out_features, M: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr):
    """Returns a program's block of rows and of columns: GROUP blocks of rows pass all columns before the next ones do."""
    blocks, parts = tl.cdiv(rows, M), tl.cdiv(out_features, N)
    first = tl.program_id(0) // (GROUP * parts) * GROUP
    within = tl.program_id(0) % (GROUP * parts)
    tall = tl.minimum(blocks - first, GROUP)
    return first + within % tall, within // tall


@triton.jit
def load(pointers, inside, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _dot(a, b, total, WIDEN: tl.constexpr):
    # the interpreter would multiply the bit patterns of bfloat16
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total)


@triton.jit
def biased(total, bias, first, n, out_features, BIAS: tl.constexpr):
    if BIAS:
        total += tl.load(bias + first + n, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=("rows",))
def linear_kernel(
    x, weight, bias, residual, moments, gain, shift, out, rows, in_features, out_features,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """x (rows, in_features), weight (out_features or, gated, 2 * out_features, in_features), out (rows, out_features).

    EVEN: `in_features` is a multiple of K.
    """
    block, part = place_of(rows, out_features, M, N, GROUP)
    r, n, k = block * M + tl.arange(0, M), part * N + tl.arange(0, N), tl.arange(0, K)
    # beyond the end the last row and column are computed again, and not stored
    row, column = tl.minimum(r, rows - 1), tl.minimum(n, out_features - 1)
    left = x + row.to(tl.int64)[:, None] * in_features + k[None, :]
    right = weight + column.to(tl.int64)[None, :] * in_features + k[:, None]
    gates = right + tl.cast(out_features, tl.int64) * in_features
    if NORM:
        mean, scale = tl.load(moments + row)[:, None], tl.load(moments + rows + row)[:, None]
    place = r.to(tl.int64)[:, None] * out_features + n[None, :]
    stored = (r < rows)[:, None] & (n < out_features)[None, :]
    # the residual is where the sums begin: behind them its tile would be held beside theirs
    total = tl.load(residual + place, mask=stored, other=0.0).to(tl.float32) if RESIDUAL else tl.zeros((M, N), tl.float32)
    gate = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, in_features, K, num_stages=STAGES):
        inside = start + k < in_features
        a = load(left + start, inside[None, :], EVEN)
        if NORM:
            g = load(gain + start + k, inside, EVEN).to(tl.float32)[None, :]
            s = load(shift + start + k, inside, EVEN).to(tl.float32)[None, :]
            a = ((a.to(tl.float32) - mean) * scale * g + s).to(x.dtype.element_ty)
        total = _dot(a, load(right + start, inside[:, None], EVEN), total, WIDEN)
        if GATE:
            gate = _dot(a, load(gates + start, inside[:, None], EVEN), gate, WIDEN)
    total = biased(total, bias, 0, n, out_features, BIAS)
    if GATE:
        gate = biased(gate, bias, out_features, n, out_features, BIAS)
        total = total * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    tl.store(out + place, total.to(out.dtype.element_ty), mask=stored)


def tiles(arch: int, gate: bool) -> tuple[Tile, ...]:
    """Returns the rows of the launch table for an architecture of any number from 80 up."""
    return (GATED if gate else TILES)[nearest(arch)]


def moments_constants(in_features: int) -> dict[str, Any]:
    """Returns the values that `moments_kernel` is compiled for."""
    padded = triton.next_power_of_2(in_features)
    return {"R": max(1, HELD // padded), "PADDED": padded}


def constants(tile: Tile, in_features: int, norm: bool, bias: bool, residual: bool, gate: bool, widen: bool) -> dict[str, Any]:
    """Returns the values that `linear_kernel` is compiled for."""
    shape = {"M": tile.rows, "N": tile.columns, "K": tile.depth, "GROUP": GROUP, "STAGES": tile.stages}
    around = {"NORM": norm, "BIAS": bias, "RESIDUAL": residual, "GATE": gate}
    return {**shape, "EVEN": in_features % tile.depth == 0, **around, "WIDEN": widen}


def linear_triton(problem: LinearProblem, tile: Tile) -> Tensor:
    """Launches the kernels on float16 or bfloat16 at one tile of the table."""
    x, weight, bias, residual, gate, gain, shift, eps = problem.contiguous()
    in_features, out_features = x.shape[-1], problem.out_shape[-1]
    rows, out = x.numel() // in_features, x.new_empty(problem.out_shape)
    moments = None if gain is None else x.new_empty((2, rows), dtype=torch.float32)
    widen = x.dtype == torch.bfloat16 and not x.is_cuda
    around = (moments is not None, bias is not None, residual is not None, gate)
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(out_features, tile.columns)
    with torch.cuda.device_of(x):
        if moments is not None:
            held = moments_constants(in_features)
            moments_kernel[(triton.cdiv(rows, held["R"]),)](x, moments, rows, in_features, eps, **held, num_warps=MOMENTS_WARPS)
        linear_kernel[(programs,)](
            x, weight, bias, residual, moments, gain, shift, out, rows, in_features, out_features,
            **constants(tile, in_features, *around, widen), num_warps=tile.warps,
        )  # fmt: skip
    return out
