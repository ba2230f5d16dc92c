"""Triton kernels of `vstar::temporal_attention` and `vstar::temporal_attention_dense`, and the table they are launched by.

One program of `tile_kernel` computes softmax(S + rowmax(S) * bias) @ v for one head at consecutive positions whose frames
fit one tile; the bias tile stays in registers. One program of `sweep_kernel` computes a block of query rows against any number
of keys in two sweeps: the exact row maximum first, then an online softmax. Each q, k and v element is read in place
through its strides and each output element written once; S = q @ k.mT is unscaled, as head_dim**-0.5 > 0 commutes with
the maximum and enters with log2(e) in the exponent.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import Device, device
from .temporal_attention_launch import DTYPES, Config, config, padded, plan

LOG2E = 1.4426950408889634
STRIDES = (*(f"{tensor}s{axis}" for tensor in "qkvo" for axis in "btph"), "bsb", "bsi", "bsj")
# one compiled kernel serves every value of these
SCALARS = ("T", "Tk", "P", "heads", "groups", "run", "scale", *STRIDES)
# entries of g that a sweep reads at a time to find where the bias ends
SCAN = tl.constexpr(256)
NAMES = {getattr(torch, dtype.torch): name for name, dtype in DTYPES.items()}


@triton.jit
def _dot(a, b, WIDEN: tl.constexpr):
    # the interpreter would multiply the bit patterns of bfloat16
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _program(pid, blocks, heads, groups):
    """Splits a program's number into row block, head, group of positions and batch item; memory's neighbours run together."""
    rest = pid // blocks
    return pid % blocks, rest % heads, rest // heads % groups, rest // heads // groups


@triton.jit
def _bias_tile(bias, bsi, bsj, i, j, T, Tk, DENSE: tl.constexpr, EVEN: tl.constexpr):
    """Loads G[i, j], or g[|i-j|] for keys j < T and zero beyond."""
    if DENSE:
        return tl.load(bias + i.to(tl.int64) * bsi + j.to(tl.int64) * bsj, mask=(i < T) & (j < Tk), other=0.0)
    distance = tl.abs(i - j)
    if EVEN:
        return tl.load(bias + distance)
    return tl.load(bias + distance, mask=(i < T) & (j < T), other=0.0)


@triton.jit
def _load(pointers, inside, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit(do_not_specialize=SCALARS)
def tile_kernel(
    q, k, v, bias, out, T, Tk, P, heads, groups, run, scale,
    qsb, qst, qsp, qsh, ksb, kst, ksp, ksh, vsb, vst, vsp, vsh, osb, ost, osp, osh, bsb, bsi, bsj,
    N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr,
    DENSE: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """T, Tk <= N. Walks `run` positions of one head; strides come in units of UNIT elements: known aligned."""
    _, head, group, batch = _program(tl.program_id(0), 1, heads, groups)
    b, h, first = batch.to(tl.int64), head.to(tl.int64), group.to(tl.int64) * run
    j = tl.arange(0, N)
    d = tl.arange(0, BD)[None, :]
    tile = _bias_tile(bias + b * bsb, bsi, bsj, j[:, None], j[None, :], T, Tk, DENSE, EVEN)
    t = j.to(tl.int64)[:, None]
    q_tile = q + (b * qsb + h * qsh + first * qsp + t * qst) * UNIT + d
    k_tile = k + (b * ksb + h * ksh + first * ksp + t * kst) * UNIT + d
    v_tile = v + (b * vsb + h * vsh + first * vsp + t * vst) * UNIT + d
    o_tile = out + (b * osb + h * osh + first * osp + t * ost) * UNIT + d
    query, key = (j[:, None] < T) & (d < D), (j[:, None] < Tk) & (d < D)
    for _p in tl.range(0, tl.minimum(P - first, run).to(tl.int32), num_stages=STAGES):
        qi, ki, vi = _load(q_tile, query, EVEN), _load(k_tile, key, EVEN), _load(v_tile, key, EVEN)
        s = _dot(qi, tl.trans(ki), WIDEN)
        if not EVEN:
            s = tl.where(j[None, :] < Tk, s, float("-inf"))
        s += tl.max(s, 1)[:, None] * tile
        e = tl.exp2((s - tl.max(s, 1)[:, None]) * scale)
        o = _dot(e.to(v.dtype.element_ty), vi, WIDEN) / tl.sum(e, 1)[:, None]
        tl.store(o_tile, o.to(out.dtype.element_ty), mask=query)
        q_tile += tl.cast(qsp, tl.int64) * UNIT
        k_tile += tl.cast(ksp, tl.int64) * UNIT
        v_tile += tl.cast(vsp, tl.int64) * UNIT
        o_tile += tl.cast(osp, tl.int64) * UNIT


@triton.jit
def _logits(qi, ki, j, Tk, EVEN: tl.constexpr, WIDEN: tl.constexpr):
    s = _dot(qi, tl.trans(ki), WIDEN)
    if EVEN:
        return s
    return tl.where(j[None, :] < Tk, s, float("-inf"))


@triton.jit
def _softmax_step(s, vi, scale, top, total, o, WIDEN: tl.constexpr):
    """Adds a tile to an online softmax: the maximum, the sum and the weighted values so far."""
    higher = tl.maximum(top, tl.max(s, 1))
    e = tl.exp2((s - higher[:, None]) * scale)
    shrink = tl.exp2((top - higher) * scale)
    return higher, total * shrink + tl.sum(e, 1), o * shrink[:, None] + _dot(e.to(vi.dtype), vi, WIDEN)


@triton.jit(do_not_specialize=SCALARS)
def sweep_kernel(
    q, k, v, bias, out, T, Tk, P, heads, groups, run, scale,
    qsb, qst, qsp, qsh, ksb, kst, ksp, ksh, vsb, vst, vsp, vsh, osb, ost, osp, osh, bsb, bsi, bsj,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr,
    DENSE: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    block, head, position, batch = _program(tl.program_id(0), tl.cdiv(T, M), heads, groups)
    b, h, p = batch.to(tl.int64), head.to(tl.int64), position.to(tl.int64)
    bias += b * bsb
    i = block * M + tl.arange(0, M)
    j = tl.arange(0, N)
    d = tl.arange(0, BD)[None, :]
    query = (i[:, None] < T) & (d < D)
    qi = _load(q + (b * qsb + h * qsh + p * qsp + i.to(tl.int64)[:, None] * qst) * UNIT + d, query, EVEN)
    k_first = k + (b * ksb + h * ksh + p * ksp + j.to(tl.int64)[:, None] * kst) * UNIT + d
    v_first = v + (b * vsb + h * vsh + p * vsp + j.to(tl.int64)[:, None] * vst) * UNIT + d
    # the distance at which the bias ends; without any the first sweep is not needed
    if DENSE:
        reach = T + Tk
    else:
        reach = 0
        for nearest in tl.range(0, T, SCAN):
            a = nearest + tl.arange(0, SCAN)
            reach = tl.maximum(reach, tl.max(tl.where(tl.load(bias + a, mask=a < T, other=0.0) != 0, a + 1, 0), 0))
    row_max = tl.full((M,), float("-inf"), tl.float32)
    for start in tl.range(0, tl.where(reach > 0, Tk, 0), N, num_stages=STAGES):
        key = (start + j[:, None] < Tk) & (d < D)
        ki = _load(k_first + tl.cast(start, tl.int64) * kst * UNIT, key, EVEN)
        row_max = tl.maximum(row_max, tl.max(_logits(qi, ki, start + j, Tk, EVEN, WIDEN), 1))
    # tiles of keys from `near` to `far` hold the bias; the others come first, without it
    end = tl.cdiv(Tk, N) * N
    near = tl.minimum(tl.maximum(block * M - reach + 1, 0) // N * N, end)
    far = tl.minimum(tl.cdiv(block * M + M - 1 + reach, N) * N, end)
    band = tl.where(reach > 0, tl.maximum(far - near, 0), 0)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    o = tl.zeros((M, BD), tl.float32)
    for rest in tl.range(0, end - band, N, num_stages=STAGES):
        start = rest + tl.where(rest < near, 0, band)
        key = (start + j[:, None] < Tk) & (d < D)
        ki = _load(k_first + tl.cast(start, tl.int64) * kst * UNIT, key, EVEN)
        vi = _load(v_first + tl.cast(start, tl.int64) * vst * UNIT, key, EVEN)
        s = _logits(qi, ki, start + j, Tk, EVEN, WIDEN)
        top, total, o = _softmax_step(s, vi, scale, top, total, o, WIDEN)
    for start in tl.range(near, near + band, N, num_stages=STAGES):
        key = (start + j[:, None] < Tk) & (d < D)
        ki = _load(k_first + tl.cast(start, tl.int64) * kst * UNIT, key, EVEN)
        vi = _load(v_first + tl.cast(start, tl.int64) * vst * UNIT, key, EVEN)
        s = _logits(qi, ki, start + j, Tk, EVEN, WIDEN)
        s += row_max[:, None] * _bias_tile(bias, bsi, bsj, i[:, None], start + j[None, :], T, Tk, DENSE, EVEN)
        top, total, o = _softmax_step(s, vi, scale, top, total, o, WIDEN)
    o = o / total[:, None]
    o_tile = out + (b * osb + h * osh + p * osp + i.to(tl.int64)[:, None] * ost) * UNIT + d
    tl.store(o_tile, o.to(out.dtype.element_ty), mask=query)


def kernel(row: Config) -> Any:
    """Returns the kernel of a launch-table row."""
    return sweep_kernel if row.sweep else tile_kernel


def constants(row: Config, head_dim: int, unit: int, dense: bool, even: bool, widen: bool) -> dict[str, Any]:
    """Returns the values that the kernel of a row is compiled for."""
    tile = {"M": row.rows, "N": row.keys} if row.sweep else {"N": row.rows}
    shape = {"D": head_dim, "BD": padded(head_dim), "UNIT": unit}
    return {**tile, **shape, "DENSE": dense, "EVEN": even, "STAGES": row.stages, "WIDEN": widen}


def temporal_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, on: Device | None = None, out: Tensor | None = None
) -> Tensor:
    """Launches on checked tensors: `bias` is g (1 or B, T) or the matrix G (1 or B, T, Tk). float16, bfloat16 and float32.

    Writes into `out` where one is given.
    """
    (_, frames, positions, heads, head_dim), keys = q.shape, k.shape[1]
    arch, multiprocessors = on or device(q)
    dense = bias.dim() == 3
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    dtype = NAMES[q.dtype]
    row = config(frames, keys, head_dim, dtype, arch)
    launch = plan(q.shape, keys, row, multiprocessors, masked=dense)
    if not dense:
        bias = bias.contiguous()
    # an axis of one element is never walked, whatever its stride
    strides = [s if n > 1 else 0 for x in (q, k, v, out) for s, n in zip(x.stride()[:4], x.shape[:4], strict=True)]
    unit = math.gcd(16 // DTYPES[dtype].bytes, *strides)
    bias_strides = (bias.stride(0) if bias.shape[0] > 1 else 0, *(bias.stride()[1:] if dense else (0, 0)))
    widen = q.dtype == torch.bfloat16 and not q.is_cuda
    values = constants(row, head_dim, unit, dense, launch.even, widen)
    with torch.cuda.device_of(q):
        kernel(row)[(launch.programs,)](
            q, k, v, bias, out, frames, keys, positions, heads, launch.groups, launch.run, head_dim**-0.5 * LOG2E,
            *(s // unit for s in strides), *bias_strides, **values, num_warps=row.warps,
        )  # fmt: skip
    return out
