"""Temporal self-attention with TAR: softmax(phi + rowmax(phi) * g[|i-j|]) @ v over the frames of each position.

phi = q @ k.mT * head_dim**-0.5 and rowmax is its signed maximum over keys before any bias (arXiv 2403.13501, eq. 3-4).
q is (B, T, P, heads, head_dim); k and v are (B, Tk, P, heads, head_dim); strides are free but the last is 1.
Keys j >= T are extra guide keys and carry no bias. The softmax runs in float32 whatever the inputs' dtype.
Triton kernels (CUDA) and a C++ library (CPU) compute it with nothing N x N in memory; here are the reference, the checks and
the registration. The reference serves float64, and a CPU whose installation has no library.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vstar_engine.kernels.cpu import calls, library

from .dispatch import triton_serves

# a run of positions whose logits fill 64 MiB keeps memory linear in P and stays near the CPU's caches
LOGITS_BYTES = 64 * 2**20
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_FRAMES = 4096
MAX_HEAD_DIM = 128


def toeplitz_bias(g: Tensor, frames: int, keys: int) -> Tensor:
    """Lays out g (..., T) as the (..., T, Tk) matrix g[|i-j|], zero for keys j >= T."""
    i, j = torch.arange(frames, device=g.device)[:, None], torch.arange(keys, device=g.device)
    distance = (i - j).abs()
    return g[..., distance.clamp(max=frames - 1)].masked_fill(j >= frames, 0.0)


def _regularised_probs(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """Returns attention probabilities (B, P, H, T, Tk) of q (B, T, P, H, D), k (B, Tk, P, H, D), bias (1 or B, T, Tk)."""
    phi = q.permute(0, 2, 3, 1, 4) @ k.permute(0, 2, 3, 4, 1) * q.shape[-1] ** -0.5
    row_max = phi.amax(dim=-1, keepdim=True)
    return torch.softmax(phi + row_max * bias[:, None, None], dim=-1)


def temporal_attention_dense_ref(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Computes the definition in float32 or wider, N x N in memory; the oracle for every other implementation."""
    wide = torch.promote_types(q.dtype, torch.float32)
    probs = _regularised_probs(q.to(wide), k.to(wide), bias.to(wide))
    out = probs @ v.to(wide).permute(0, 2, 3, 1, 4)
    return out.permute(0, 3, 1, 2, 4).to(q.dtype).contiguous()


def temporal_attention_ref(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Computes `temporal_attention` by the definition."""
    return temporal_attention_dense_ref(q, k, v, toeplitz_bias(torch.atleast_2d(g), q.shape[1], k.shape[1]))


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, bias_shape: tuple[int, ...], name: str) -> None:
    if q.dim() != 5 or k.dim() != 5:
        raise ValueError(f"q, k, v must be (B, T, P, heads, head_dim), got {tuple(q.shape)}, {tuple(k.shape)}")
    if k.shape != v.shape or q.shape[:1] + q.shape[2:] != k.shape[:1] + k.shape[2:]:
        raise ValueError(f"q, k, v must agree but for the frames, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q, k, v must not be empty, got {tuple(q.shape)}, {tuple(k.shape)}")
    if q.shape[1] > MAX_FRAMES or k.shape[1] > MAX_FRAMES:
        raise ValueError(f"q, k, v must have at most {MAX_FRAMES} frames, got {q.shape[1]}, {k.shape[1]}")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"the head width of q, k, v must be at most {MAX_HEAD_DIM}, got {q.shape[-1]}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(f"q, k, v must share one dtype of {DTYPES}, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device == bias.device:
        raise ValueError(f"q, k, v and {name} must be on one device, got {q.device}, {k.device}, {v.device}, {bias.device}")
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in (q, k, v)):
        raise ValueError(f"the last stride of q, k, v must be 1, got {q.stride(-1)}, {k.stride(-1)}, {v.stride(-1)}")
    if bias.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, got {bias.dtype}")
    if bias.dim() != len(bias_shape) or bias.shape[1:] != bias_shape[1:] or bias.shape[0] not in (1, q.shape[0]):
        raise ValueError(f"{name} must be (1 or {q.shape[0]}, {', '.join(map(str, bias_shape[1:]))}), got {tuple(bias.shape)}")


def _by_positions(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    batch, frames, positions, heads, _ = q.shape
    step = max(1, LOGITS_BYTES // (4 * batch * heads * frames * k.shape[1]))
    if step >= positions:
        return temporal_attention_dense_ref(q, k, v, bias)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for p in range(0, positions, step):
        here = slice(p, p + step)
        out[:, :, here] = temporal_attention_dense_ref(q[:, :, here], k[:, :, here], v[:, :, here], bias)
    return out


def _compute(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Chooses the implementation for checked arguments; `bias` is g (1 or B, T) or the matrix G (1 or B, T, Tk)."""
    if triton_serves(q):
        # imported here: a machine without Triton computes on its CPU
        from vstar_engine.kernels.gpu.temporal_attention import temporal_attention_triton

        return temporal_attention_triton(q, k, v, bias)
    if library.serves(q):
        return calls.attend(q, k, v, bias)
    return _by_positions(q, k, v, bias if bias.dim() == 3 else toeplitz_bias(bias, q.shape[1], k.shape[1]))


def _with_g(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    _check(q, k, v, g, (q.shape[0], q.shape[1]), "g")
    return _compute(q, k, v, g)


_temporal_attention = torch.library.custom_op("vstar::temporal_attention", _with_g, mutates_args=())


@_temporal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    _check(q, k, v, g, (q.shape[0], q.shape[1]), "g")
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("vstar::temporal_attention_dense", mutates_args=())
def _temporal_attention_dense(q: Tensor, k: Tensor, v: Tensor, G: Tensor) -> Tensor:
    _check(q, k, v, G, (q.shape[0], q.shape[1], k.shape[1]), "G")
    return _compute(q, k, v, G)


@_temporal_attention_dense.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, G: Tensor) -> Tensor:
    _check(q, k, v, G, (q.shape[0], q.shape[1], k.shape[1]), "G")
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _register_backward(op: Any, reference: Callable[..., Tensor]) -> None:
    """Registers gradients for q, k and v that recompute `reference`, N x N in memory only there."""

    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *qkv, bias = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in qkv]
            out = reference(*leaves, bias)
        return (*torch.autograd.grad(out, leaves, grad), None)

    op.register_autograd(backward, setup_context=setup_context)


_register_backward(_temporal_attention, temporal_attention_ref)
_register_backward(_temporal_attention_dense, temporal_attention_dense_ref)


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Attends over the frames of each position: softmax(phi + rowmax(phi) * g[|i-j|]) @ v, phi = q @ k.mT * head_dim**-0.5.

    q is (B, T, P, heads, head_dim); k and v are (B, Tk, P, heads, head_dim), Tk < T allowed. They share a dtype, float16,
    bfloat16, float32 or float64, and a device; their last stride is 1. g is (1 or B, T) or (T,) float32; zeros are plain
    attention. Keys from T on have no bias. Returns (B, T, P, heads, head_dim), contiguous, in q's dtype; computes in float32 or
    wider. Differentiable in q, k and v. Raises ValueError for other shapes, dtypes or strides. TAR, arXiv 2403.13501, eq. 3-4.
    """
    compute = _with_g if library.unwatched(q) and library.serves(q) else torch.ops.vstar.temporal_attention
    return compute(q, k, v, g[None] if g.dim() == 1 else g)


def temporal_attention_dense(q: Tensor, k: Tensor, v: Tensor, G: Tensor) -> Tensor:
    """As `temporal_attention`, with a bias for each pair of frames: softmax(phi + rowmax(phi) * G) @ v.

    G is (1 or B, T, Tk) float32. Shapes, dtypes, result and errors are those of `temporal_attention`.
    """
    return torch.ops.vstar.temporal_attention_dense(q, k, v, G)


def temporal_attention_probs(q: Tensor, k: Tensor, g: Tensor, positions: list[int] | Tensor) -> Tensor:
    """Returns the regularised attention probabilities at chosen positions, averaged over heads.

    q (B, T, P, heads, head_dim), k (B, Tk, P, heads, head_dim) and g are as in `temporal_attention`. `positions` are indices
    into P. Returns (B, len(positions), T, Tk) float32. Raises ValueError as `temporal_attention` does.
    """
    g = torch.atleast_2d(g)
    _check(q, k, k, g, (q.shape[0], q.shape[1]), "g")
    chosen = torch.as_tensor(positions, device=q.device)
    (batch, frames, _, heads, _), keys = q.shape, k.shape[1]
    bias = toeplitz_bias(g, frames, keys)
    out = torch.zeros(batch, len(chosen), frames, keys, device=q.device)
    # one head of a run of positions at a time: the working memory is bounded, and but for that only the result is N x N
    run = max(1, LOGITS_BYTES // (4 * batch * frames * keys))
    for here, mean in zip(chosen.split(run), out.split(run, dim=1), strict=True):
        for head in range(heads):
            one = (slice(None), slice(None), here, slice(head, head + 1))
            mean += _regularised_probs(q[one].float(), k[one].float(), bias)[:, :, 0] / heads
    return out
