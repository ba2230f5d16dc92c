"""Triton kernel of `vstar::linear_e4m3`.

A program computes a tile of the result, as in `linear.py`. Rows in the network's dtype are rounded on the way to the tensor
cores, so rounded rows are never written. Scales, bias, gate and residual are applied to the sums in float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vstar_engine.kernels.problems import Fp8LinearProblem

from .fp8_conv2d import WITHIN
from .fp8_quantize import rounded
from .linear import GROUP, Tile, biased, load, place_of
from .temporal_attention_launch import nearest

# no row was timed on a GPU: they fit the registers and the shared memory, and `autotune` tries them out where they run
_ADA = (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3))
_HOPPER = (Tile(128, 256, 64, 8, 4), Tile(128, 128, 128, 8, 3))
TILES: dict[int, tuple[Tile, ...]] = {89: _ADA, 90: _HOPPER, 100: _HOPPER, 120: _ADA}
# columns of a tile whose sums leave a thread registers for as much of a residual
BESIDE = 128


@triton.jit(do_not_specialize=("rows",))
def linear_e4m3_kernel(
    x, weight, step, scale, bias, residual, then, out, rows, in_features, out_features,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    ROUND: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr, THEN: tl.constexpr,
    WITHIN: tl.constexpr,
):  # fmt: skip
    """x (rows, in_features), weight (out_features or, gated, 2 * out_features, in_features), out (rows, out_features).

    EVEN: `in_features` is a multiple of K. ROUND: x is not in e4m3 yet: divide it by the step and round it.
    THEN: round the result to e4m3 likewise, by the step `then`.
    """
    block, part = place_of(rows, out_features, M, N, GROUP)
    r, n, k = block * M + tl.arange(0, M), part * N + tl.arange(0, N), tl.arange(0, K)
    # beyond the end the last row and column are computed again, and not stored
    row, column = tl.minimum(r, rows - 1), tl.minimum(n, out_features - 1)
    left = x + row.to(tl.int64)[:, None] * in_features + k[None, :]
    right = weight + column.to(tl.int64)[None, :] * in_features + k[:, None]
    gates = right + tl.cast(out_features, tl.int64) * in_features
    factor = tl.load(step)
    per_step, factor = 1.0 / factor, factor * tl.load(scale)
    total, gate = tl.zeros((M, N), tl.float32), tl.zeros((M, N), tl.float32)
    for start in tl.range(0, in_features, K, num_stages=STAGES):
        inside = start + k < in_features
        a = load(left + start, inside[None, :], EVEN)
        if ROUND:
            a = rounded(a.to(tl.float32), per_step)
        total = tl.dot(a, load(right + start, inside[:, None], EVEN), total, max_num_imprecise_acc=WITHIN)
        if GATE:
            gate = tl.dot(a, load(gates + start, inside[:, None], EVEN), gate, max_num_imprecise_acc=WITHIN)
    total = biased(total * factor, bias, 0, n, out_features, BIAS)
    if GATE:
        gate = biased(gate * factor, bias, out_features, n, out_features, BIAS)
        total = total * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    place = r.to(tl.int64)[:, None] * out_features + n[None, :]
    stored = (r < rows)[:, None] & (n < out_features)[None, :]
    if RESIDUAL:
        # behind the sums: the tensor cores of some GPUs would add to it in fewer bits than float32 has
        total += tl.load(residual + place, mask=stored, other=0.0).to(tl.float32)
    if THEN:
        tl.store(out + place, rounded(total, 1.0 / tl.load(then)), mask=stored)
    else:
        tl.store(out + place, total.to(out.dtype.element_ty), mask=stored)


def tiles(arch: int, residual: bool, gate: bool) -> tuple[Tile, ...]:
    """Returns the tiles to try on an architecture that has e4m3; a gated one's columns are half values, half gates."""
    if arch < min(TILES):
        raise ValueError(f"FP8 needs compute capability 8.9 or newer, got {arch / 10}")
    found = [tile for tile in TILES[nearest(arch)] if tile.columns <= BESIDE or not residual]
    return tuple(tile._replace(columns=tile.columns // 2) if gate else tile for tile in found)


def constants(tile: Tile, in_features: int, rounds: bool, bias: bool, residual: bool, gate: bool, then: bool) -> dict[str, Any]:
    """Returns the values that `linear_e4m3_kernel` is compiled for."""
    shape = {"M": tile.rows, "N": tile.columns, "K": tile.depth, "GROUP": GROUP, "STAGES": tile.stages}
    around = {"ROUND": rounds, "BIAS": bias, "RESIDUAL": residual, "GATE": gate, "THEN": then}
    return {**shape, "EVEN": in_features % tile.depth == 0, **around, "WITHIN": min(WITHIN, tile.depth)}


def linear_e4m3_triton(problem: Fp8LinearProblem, tile: Tile) -> Tensor:
    """Launches the kernel at one tile of the table."""
    x, weight, step, scale, bias, residual, gate, then, _ = problem.contiguous()
    in_features, out_features = x.shape[-1], problem.out_shape[-1]
    rows, out = x.numel() // in_features, x.new_empty(problem.out_shape, dtype=problem.out_dtype)
    around = (problem.rounds, bias is not None, residual is not None, gate, then is not None)
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(out_features, tile.columns)
    with torch.cuda.device_of(x):
        linear_e4m3_kernel[(programs,)](
            x, weight, step, scale, bias, residual, then, out, rows, in_features, out_features,
            **constants(tile, in_features, *around), num_warps=tile.warps,
        )  # fmt: skip
    return out
