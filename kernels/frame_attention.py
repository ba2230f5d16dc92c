"""Attention over the tokens of a clip, its logits changed by tables of frame pairs: `vstar::frame_attention`.

q, k, v are (B, N, heads, head_dim); N = F * tokens, frame after frame; token n is of frame f = n // tokens. With
s = q @ k.mT * head_dim**-0.5, the frame distance d = |f_q - f_k| and the token distance |i - j|:

    s'_ij = a[d] * s_ij * (decay if |i - j| > beyond and s_ij > 0 else 1) + g[d] * m_i + b[f_q, f_k]
    out   = softmax(s') @ v

m_i is the signed maximum of s_i over the keys that `b` does not exclude; pairs of frames with b = -inf are excluded and
skipped. A query frame must keep one key frame, or its rows are NaN. The softmax runs in float32 whatever the inputs' dtype,
and nothing is N x N in memory. A Triton kernel computes it on a GPU; here are the reference, the CPU's path, the checks and
the registration.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .dispatch import triton_serves
from .problems import FrameProblem, FrameTables, schema
from .temporal_attention import DTYPES, MAX_HEAD_DIM

# logits of a run of query rows, which stay in a CPU's caches between the passes over them
BLOCK_BYTES = 4 * 2**20


def _logits(q: Tensor, k: Tensor, tables: FrameTables, tokens: int) -> Tensor:
    """Returns s' (B, H, N, N) of q and k (B, H, N, D)."""
    s = q @ k.mT * q.shape[-1] ** -0.5
    j = torch.arange(k.shape[2], device=q.device)
    i = j[:, None]
    pairs = i // tokens, j // tokens
    distance = (pairs[0] - pairs[1]).abs()
    bias = s.new_zeros(distance.shape) if tables.b is None else tables.b.to(s.dtype)[pairs]
    changed = s
    if tables.beyond >= 0:
        changed = torch.where(((i - j).abs() > tables.beyond) & (s > 0), s * tables.decay, s)
    if tables.a is not None:
        changed = changed * tables.a.to(s.dtype)[distance]
    if tables.g is not None:
        top = s.masked_fill(bias == -math.inf, -math.inf).amax(-1, keepdim=True)
        changed = changed + tables.g.to(s.dtype)[distance] * top
    return changed + bias


def frame_attention_ref(q: Tensor, k: Tensor, v: Tensor, tables: FrameTables, tokens: int) -> Tensor:
    """Computes the definition in float32 or wider, N x N in memory; the oracle for every other implementation."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_ = (x.to(wide).transpose(1, 2) for x in (q, k, v))
    out = torch.softmax(_logits(q_, k_, tables, tokens), dim=-1) @ v_
    return out.transpose(1, 2).to(q.dtype).contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, tables: FrameTables, tokens: int) -> None:
    if q.dim() != 4 or not q.shape == k.shape == v.shape or 0 in q.shape:
        raise ValueError(f"q, k, v must be (B, N, heads, head_dim), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if tokens < 1 or q.shape[1] % tokens:
        raise ValueError(f"the {q.shape[1]} tokens must be whole frames, and a frame was said to have {tokens}")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"the head width of q, k, v must be at most {MAX_HEAD_DIM}, got {q.shape[-1]}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(f"q, k, v must share one dtype of {DTYPES}, got {q.dtype}, {k.dtype}, {v.dtype}")
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in (q, k, v)):
        raise ValueError(f"the last stride of q, k, v must be 1, got {q.stride(-1)}, {k.stride(-1)}, {v.stride(-1)}")
    frames = q.shape[1] // tokens
    for name, table, shape in (("a", tables.a, (frames,)), ("g", tables.g, (frames,)), ("b", tables.b, (frames, frames))):
        if table is None:
            continue
        if table.shape != shape or table.dtype != torch.float32:
            raise ValueError(f"{name} must be float32 {shape}, got {table.dtype} {tuple(table.shape)}")
        if table.device != q.device:
            raise ValueError(f"q, k, v and {name} must be on one device, got {q.device} and {table.device}")
    if not math.isfinite(tables.decay):
        raise ValueError(f"decay must be a finite number, got {tables.decay}")


def _by_rows(q: Tensor, k: Tensor, v: Tensor, tables: FrameTables, tokens: int) -> Tensor:
    """Computes runs of one frame's query rows, whose logits stay within BLOCK_BYTES; their tables are rows over the keys."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_ = (x.to(wide).transpose(1, 2) for x in (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    batch, count, heads, _ = q.shape
    run = max(1, min(tokens, BLOCK_BYTES // (4 * batch * heads * count)))
    token = torch.arange(count, device=q.device)
    for first in (f + r for f in range(0, count, tokens) for r in range(0, tokens, run)):
        frame = first // tokens
        rows = slice(first, min(first + run, (frame + 1) * tokens))
        distance = (token // tokens - frame).abs()
        bias = None if tables.b is None else tables.b[frame].repeat_interleave(tokens).to(wide)
        s = (q_[:, :, rows] * q.shape[-1] ** -0.5) @ k_.mT
        top = None
        if tables.g is not None:
            kept = s if bias is None else s.masked_fill(bias == -math.inf, -math.inf)
            top = kept.amax(-1, keepdim=True)
        if tables.beyond >= 0 and tables.decay != 1.0:
            far = (token[rows, None] - token).abs() > tables.beyond
            s -= s.clamp(min=0.0).mul_(far * (1 - tables.decay))
        if tables.a is not None:
            s *= tables.a[distance].to(wide)
        if tables.g is not None:
            s.addcmul_(top, tables.g[distance].to(wide))
        if bias is not None:
            s += bias
        out[:, rows] = (torch.softmax(s, dim=-1) @ v_).transpose(1, 2)
    return out


def _by_frames(q: Tensor, k: Tensor, v: Tensor, b: Tensor | None, tokens: int) -> Tensor:
    """Computes an additive rule by PyTorch's attention, a row of `b` for each query frame or run of frames with equal rows."""
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    if b is None:
        return scaled_dot_product_attention(q_, k_, v_).transpose(1, 2).contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    wide = torch.promote_types(q.dtype, torch.float32)
    starts = [0, *(f for f in range(1, len(b)) if not torch.equal(b[f], b[f - 1])), len(b)]
    for start, end in pairwise(starts):
        rows = slice(start * tokens, end * tokens)
        mask = b[start].repeat_interleave(tokens).to(wide).expand(1, 1, (end - start) * tokens, -1)
        kept = torch.isfinite(b[start]).nonzero()
        # what lies before the first key frame that is kept and after the last one is not read
        keys = slice(int(kept[0]) * tokens, (int(kept[-1]) + 1) * tokens) if len(kept) else slice(None)
        attended = scaled_dot_product_attention(q_[:, :, rows], k_[:, :, keys], v_[:, :, keys], attn_mask=mask[..., keys])
        out[:, rows] = attended.transpose(1, 2)
    return out


def _compute(*given: Any) -> Tensor:
    problem = FrameProblem(*given)
    (q, k, v), tables, tokens = problem[:3], problem.tables, problem.tokens
    _check(q, k, v, tables, tokens)
    if triton_serves(q):
        # imported here: a machine without Triton computes on its CPU
        from vstar_engine.kernels.gpu.frame_attention import frame_attention_triton

        return frame_attention_triton(q, k, v, tables, tokens)
    return _by_frames(q, k, v, tables.b, tokens) if tables.additive else _by_rows(q, k, v, tables, tokens)


_frame_attention = torch.library.custom_op("vstar::frame_attention", _compute, mutates_args=(), schema=schema(FrameProblem))


@_frame_attention.register_fake
def _(*given: Any) -> Tensor:
    problem = FrameProblem(*given)
    _check(problem.q, problem.k, problem.v, problem.tables, problem.tokens)
    return torch.empty_like(problem.q, memory_format=torch.contiguous_format)


def frame_attention(q: Tensor, k: Tensor, v: Tensor, tables: FrameTables, tokens: int) -> Tensor:
    """Attends over a clip's tokens by the rule of `tables`.

    q, k, v (B, F * tokens, heads, head_dim), all float16, bfloat16, float32 or float64, last stride 1; returns the same shape
    and dtype, contiguous. Raises ValueError for anything else, and for tables that are not of F frames.
    """
    return torch.ops.vstar.frame_attention(q, k, v, *tables, tokens)
