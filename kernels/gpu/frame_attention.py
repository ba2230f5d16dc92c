"""The Triton kernel of `vstar::frame_attention`, and the table it is launched by.

One program computes a tile of query rows of one frame and head against every key frame in turn, so that a pair of frames has
one entry of each table: a scalar. Two sweeps where g is used (the exact row maximum first), else one, with an online softmax.
Key frames at minus infinity are skipped in both. q, k and v are read in place through their strides. No row of the table was
timed on a GPU; they were chosen from compiled code.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vstar_engine.kernels.problems import FrameTables

from .device import Device, device
from .temporal_attention import LOG2E, NAMES, _dot, _load, _softmax_step
from .temporal_attention_launch import DTYPES, GRID_LIMIT, nearest, padded

STRIDES = tuple(f"{tensor}s{axis}" for tensor in "qkvo" for axis in "bnh")
# left alone, ptxas spills a few registers to stay at 64, 80 or 128 a thread; eight warps may have so many
REGISTERS = 248
# one compiled kernel serves every value of these
SCALARS = ("frames", "tokens", "heads", "scale", "decay", "beyond", *STRIDES)


@dataclass(frozen=True)
class FrameConfig:
    """A row of the table: a tile of `rows` x `keys`, warps, and stages of the load pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def frame_config(head_dim: int, dtype: str, arch: int) -> FrameConfig:
    """Chooses the row for a head width and dtype on an architecture of any number from 80 up."""
    width = padded(head_dim)
    if DTYPES[dtype].bytes == 4:
        return FrameConfig(32, 32 if width <= 64 else 16, 8, 1)
    if nearest(arch) in (90, 100):
        # wider tiles spill on sm_100, whose accumulators come back from tensor memory
        return FrameConfig(128, 32 if nearest(arch) == 100 and width == 128 else 64, 8, 2)
    return FrameConfig(64, 32, 8 if width == 128 else 4, 2)


@triton.jit
def _pair_logits(
    qi, k_frame, start, tokens, ksn, scale, d, j,
    D: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    key = (start + j[:, None] < tokens) & (d < D)
    ki = _load(k_frame + (start + j).to(tl.int64)[:, None] * ksn * UNIT + d, key, EVEN)
    s = _dot(qi, tl.trans(ki), WIDEN) * scale
    if EVEN:
        return s
    return tl.where(start + j[None, :] < tokens, s, float("-inf"))


@triton.jit(do_not_specialize=SCALARS)
def frame_kernel(
    q, k, v, a, g, b, out, frames, tokens, heads, scale, decay, beyond,
    qsb, qsn, qsh, ksb, ksn, ksh, vsb, vsn, vsh, osb, osn, osh,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr,
    A: tl.constexpr, G: tl.constexpr, B: tl.constexpr, DECAY: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Logits are kept in units of log2: `scale` holds log2(e), and so does what is added to them."""
    blocks = tl.cdiv(tokens, M)
    pid = tl.program_id(0)
    block, fi = pid % blocks, pid // blocks % frames
    head, batch = (pid // blocks // frames % heads).to(tl.int64), (pid // blocks // frames // heads).to(tl.int64)
    t = block * M + tl.arange(0, M)
    j = tl.arange(0, N)
    d = tl.arange(0, BD)[None, :]
    query = (t[:, None] < tokens) & (d < D)
    i = fi * tokens + t
    qi = _load(q + (batch * qsb + head * qsh + i.to(tl.int64)[:, None] * qsn) * UNIT + d, query, EVEN)
    k_head = k + (batch * ksb + head * ksh) * UNIT
    v_head = v + (batch * vsb + head * vsh) * UNIT
    row_max = tl.full((M,), float("-inf"), tl.float32)
    if G:
        for fj in tl.range(0, frames):
            end = tokens
            if B:
                end = tl.where(tl.load(b + fi * frames + fj) > float("-inf"), tokens, 0)
            k_frame = k_head + tl.cast(fj * tokens, tl.int64) * ksn * UNIT
            for start in tl.range(0, end, N, num_stages=STAGES):
                s = _pair_logits(qi, k_frame, start, tokens, ksn, scale, d, j, D, UNIT, EVEN, WIDEN)
                row_max = tl.maximum(row_max, tl.max(s, 1))
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    o = tl.zeros((M, BD), tl.float32)
    for fj in tl.range(0, frames):
        end = tokens
        distance = tl.abs(fi - fj)
        added = tl.zeros((M,), tl.float32)
        if B:
            bias = tl.load(b + fi * frames + fj)
            end = tl.where(bias > float("-inf"), tokens, 0)
            added += tl.where(bias > float("-inf"), bias * 1.4426950408889634, 0.0)
        if G:
            added += tl.load(g + distance) * row_max
        k_frame = k_head + tl.cast(fj * tokens, tl.int64) * ksn * UNIT
        v_frame = v_head + tl.cast(fj * tokens, tl.int64) * vsn * UNIT
        for start in tl.range(0, end, N, num_stages=STAGES):
            s = _pair_logits(qi, k_frame, start, tokens, ksn, scale, d, j, D, UNIT, EVEN, WIDEN)
            if DECAY:
                apart = tl.abs(i[:, None] - (fj * tokens + start + j[None, :]))
                s = tl.where((apart > beyond) & (s > 0), s * decay, s)
            if A:
                s = s * tl.load(a + distance)
                if not EVEN:
                    # a factor below zero would turn what lies outside to plus infinity
                    s = tl.where(start + j[None, :] < tokens, s, float("-inf"))
            s += added[:, None]
            vi = _load(
                v_frame + (start + j).to(tl.int64)[:, None] * vsn * UNIT + d, (start + j[:, None] < tokens) & (d < D), EVEN
            )
            top, total, o = _softmax_step(s, vi, 1.0, top, total, o, WIDEN)
    o = o / total[:, None]
    o_tile = out + (batch * osb + head * osh + i.to(tl.int64)[:, None] * osn) * UNIT + d
    tl.store(o_tile, o.to(out.dtype.element_ty), mask=query)


def frame_constants(
    row: FrameConfig, head_dim: int, unit: int, tables: tuple[bool, bool, bool, bool], even: bool, widen: bool
) -> dict[str, Any]:
    """Returns the values that the kernel of a row is compiled for; `tables` says whether a, g, b and decay are used."""
    shape = {"M": row.rows, "N": row.keys, "D": head_dim, "BD": padded(head_dim), "UNIT": unit}
    used = dict(zip(("A", "G", "B", "DECAY"), tables, strict=True))
    return {**shape, **used, "EVEN": even, "STAGES": row.stages, "WIDEN": widen}


def frame_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, tables: FrameTables, tokens: int, on: Device | None = None
) -> Tensor:
    """Launches on checked tensors: float16, bfloat16 and float32."""
    (batch, count, heads, head_dim), dtype = q.shape, NAMES[q.dtype]
    frames = count // tokens
    row = frame_config(head_dim, dtype, (on or device(q)).arch)
    programs = batch * heads * frames * -(-tokens // row.rows)
    if programs > GRID_LIMIT:
        raise ValueError(f"batch x heads x tokens needs {programs} programs, and a grid holds at most {GRID_LIMIT}")
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    # an axis of one element is never walked, whatever its stride
    strides = [s if n > 1 else 0 for x in (q, k, v, out) for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    unit = math.gcd(16 // DTYPES[dtype].bytes, *strides)
    even = head_dim == padded(head_dim) and tokens % row.rows == 0 and tokens % row.keys == 0
    a, g, b = (q if table is None else table.contiguous() for table in tables[:3])
    used = (tables.a is not None, tables.g is not None, tables.b is not None, tables.beyond >= 0 and tables.decay != 1.0)
    values = frame_constants(row, head_dim, unit, used, even, q.dtype == torch.bfloat16 and not q.is_cuda)
    with torch.cuda.device_of(q):
        frame_kernel[(programs,)](
            q, k, v, a, g, b, out, frames, tokens, heads, head_dim**-0.5 * LOG2E, tables.decay, tables.beyond,
            *(s // unit for s in strides), **values, num_warps=row.warps,
            maxnreg=REGISTERS,
        )  # fmt: skip
    return out
