"""The ops as rows of a table: shapes, variants, what draws their arguments, who computes them, and their definition."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.plain_attention import by_eager
from vstar_engine.kernels.geglu import geglu, geglu_ref
from vstar_engine.kernels.groupnorm_silu import groupnorm_silu, groupnorm_silu_ref
from vstar_engine.kernels.guided_step import COEFFICIENTS, guided_step, guided_step_ref
from vstar_engine.kernels.linear import linear, linear_ref
from vstar_engine.kernels.problems import LinearProblem
from vstar_engine.kernels.temporal_attention import temporal_attention, temporal_attention_dense, toeplitz_bias

FLOAT, HALVES = (torch.float32,), (torch.float16, torch.bfloat16)
# a small tile for Triton's interpreter: two stages and no pipeline
TILE_SIDES = (16, 16, 16, 1, 2)
LINEAR_VARIANTS = {
    "plain": (),
    "bias": ("bias",),
    "bias, residual": ("bias", "residual"),
    "residual": ("residual",),
    "norm": ("norm",),
    "norm, bias": ("norm", "bias"),
    "norm, bias, residual": ("norm", "bias", "residual"),
    "gate": ("gate",),
    "bias, gate": ("bias", "gate"),
    "norm, bias, gate": ("norm", "bias", "gate"),
    "norm, gate": ("norm", "gate"),
}


class Op(NamedTuple):
    """A row of the table.

    `shapes` are a plain one, odd ones and a tiny one; `large` ones, of many blocks, are not for an interpreter. `draw` makes
    arguments for a shape, a dtype and a variant; `cpu` and `triton` compute them, in the dtypes that each has kernels for;
    `ref` defines the result. The first result has the memory layout of the first argument where `like_first`.
    """

    shapes: tuple[Any, ...]
    large: tuple[Any, ...]
    variants: dict[str, Any]
    draw: Callable[[Any, torch.dtype, Any], tuple[Any, ...]]
    cpu: Callable[..., Any]
    triton: Callable[..., Any]
    ref: Callable[..., Any]
    cpu_dtypes: tuple[torch.dtype, ...] = (*FLOAT, *HALVES)
    triton_dtypes: tuple[torch.dtype, ...] = (*FLOAT, *HALVES)
    like_first: bool = False


def draw_geglu(shape: tuple[int, ...], dtype: torch.dtype, _: object) -> tuple[Tensor]:
    return ((4 * torch.randn(shape)).to(dtype),)


def draw_groupnorm(case: tuple[tuple[int, ...], int], dtype: torch.dtype, silu: bool) -> tuple[Any, ...]:
    """Draws hidden states (N, C, ...) in channels-last memory, their mean beside zero."""
    shape, groups = case
    x = (3 * torch.randn(shape) + 5).to(dtype).movedim(1, -1).contiguous().movedim(-1, 1)
    return x, groups, *torch.randn(2, shape[1]).to(dtype), 1e-5, silu


def draw_linear(shape: tuple[int, ...], dtype: torch.dtype, around: tuple[str, ...]) -> LinearProblem:
    """Draws a problem; rows lie far from zero where they are normed."""
    *rows, in_features, out_features = shape
    gate, norm = "gate" in around, "norm" in around
    x = torch.randn(*rows, in_features) + (30 if norm else 0)
    weight = torch.randn(2 * out_features if gate else out_features, in_features) / in_features**0.5
    bias = torch.randn(len(weight)) if "bias" in around else None
    residual = torch.randn(*rows, out_features) if "residual" in around else None
    gains = (1 + torch.rand(in_features), torch.randn(in_features)) if norm else ()
    tensors = [None if tensor is None else tensor.to(dtype) for tensor in (x, weight, bias, residual, *gains)]
    return LinearProblem(*tensors[:4], gate, *tensors[4:], *([1e-5] if norm else []))


def draw_guided_step(shape: tuple[int, ...], dtype: torch.dtype, depth: int) -> tuple[Tensor | None, ...]:
    """Draws a step: every video by coefficients of its own, the last without guidance; predictions in the network's dtype."""
    videos = shape[0]
    latents, noise = torch.randn(2, *shape)
    eps = torch.randn(2 * videos, *shape[1:]).to(dtype)
    plain = torch.tensor([*range(videos, 2 * videos - 1), videos - 1])
    history = torch.randn(videos, depth, *shape[1:]) if depth else None
    return latents, eps, plain, 0.2 + 3 * torch.rand(videos, len(COEFFICIENTS) + depth), noise, history


def draw_attention(shape: tuple[int, ...], dtype: torch.dtype, dense: bool) -> tuple[Tensor, ...]:
    batch, frames, *_ = shape
    q, k, v = torch.randn(3, *shape).to(dtype)
    return q, k, v, torch.randn(batch, frames, frames) if dense else torch.randn(batch, frames)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (temporal_attention if bias.dim() == 2 else temporal_attention_dense)(q, k, v, bias)


def attention_ref(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return by_eager(q, k, v, toeplitz_bias(bias, q.shape[1], k.shape[1]) if bias.dim() == 2 else bias)


def linear_by_triton(*given: Any) -> Tensor:
    from vstar_engine.kernels.gpu.linear import Tile, linear_triton

    return linear_triton(LinearProblem(*given), Tile(*TILE_SIDES))


OPS = {
    "geglu": Op(
        shapes=((2, 3, 256), (3, 2, 2560), (5, 6), (3, 14), (2,)),
        large=((2, 64, 512), (1000, 1280)),
        variants={"": None},
        draw=draw_geglu,
        cpu=geglu,
        triton=geglu,
        ref=geglu_ref,
    ),
    "groupnorm_silu": Op(
        shapes=(((2, 64, 5, 13), 32), ((1, 40, 3, 33, 5), 8), ((1, 24, 6000), 1), ((3, 8, 1), 4)),
        large=(
            ((2, 24, 6000), 1),
            ((6, 64, 5, 7), 32),
            ((2, 320, 4, 100), 32),
            ((1, 80, 7, 3, 4), 8),
            ((1, 5, 3000), 1),
            ((1, 24, 65536), 3),
        ),
        variants={"silu": True, "plain": False},
        draw=draw_groupnorm,
        cpu=groupnorm_silu,
        triton=groupnorm_silu,
        ref=groupnorm_silu_ref,
        like_first=True,
    ),
    "linear": Op(
        shapes=((2, 24, 32, 48), (3, 17, 40, 24), (5, 6, 3), (1, 16, 16)),
        large=((2, 30, 64, 192), (1, 7, 37, 50), (3, 129, 700, 20), (2, 24, 16, 640), (2, 1700, 16, 64)),
        variants=LINEAR_VARIANTS,
        draw=draw_linear,
        cpu=lambda *given: linear(LinearProblem(*given)),
        triton=linear_by_triton,
        ref=lambda *given: linear_ref(LinearProblem(*given)),
        cpu_dtypes=FLOAT,
        triton_dtypes=HALVES,
    ),
    "guided_step": Op(
        shapes=((2, 4, 3, 16, 24), (3, 4, 1, 5, 7), (1, 1)),
        large=(),
        variants={"": 0, "history1": 1, "history2": 2},
        draw=draw_guided_step,
        cpu=guided_step,
        triton=guided_step,
        ref=guided_step_ref,
    ),
    "temporal_attention": Op(
        shapes=((2, 16, 9, 2, 64), (1, 31, 5, 3, 40), (1, 1, 1, 1, 8)),
        large=((1, 129, 3, 2, 64),),
        variants={"toeplitz": False, "dense": True},
        draw=draw_attention,
        cpu=attention,
        triton=attention,
        ref=attention_ref,
    ),
}


def widened(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the arguments in float64."""
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given)


def placed(given: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """Returns the arguments on a device, in the memory layout that they have."""
    return tuple(x.to(device) if isinstance(x, Tensor) else x for x in given)
