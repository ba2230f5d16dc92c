"""The ops on a CPU by the package's C++ library (csrc/cpu), loaded with ctypes.

The library is looked for in the files of the installed distribution, not beside this module: in a checkout's folder the
checkout's modules shadow the installed ones. Without it the references take over, with one warning; `status` says why.
"""

import ctypes

import torch
from torch import Tensor

from vstar_engine.kernels.problems import LayerNorm, LinearProblem

from .arguments import Arguments, GegluArguments, GroupNormArguments, LinearArguments, LinearPairArguments
from .library import DTYPES, isa_number, loaded, raise_for


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Runs checked arguments of `temporal_attention` (bias = g) or `temporal_attention_dense` (bias = G, three axes)."""
    library = loaded()
    out = torch.empty(q.shape, dtype=q.dtype)
    bias = bias.contiguous()
    batch, frames, positions, heads, head_dim = q.shape
    arguments = Arguments(
        *(x.data_ptr() for x in (q, k, v, out, bias)),
        *(batch, frames, k.shape[1], positions, heads, head_dim, bias.shape[0]),
        *(x.stride()[:4] for x in (q, k, v, out)),
        *(DTYPES[q.dtype], bias.dim() == 3, isa_number(library), torch.get_num_threads()),
    )
    raise_for(library.handle.vstar_temporal_attention(ctypes.byref(arguments)))
    return out


def geglu(x: Tensor) -> Tensor:
    """Applies GEGLU to contiguous x (..., 2 * inner) -> (..., inner)."""
    library, inner = loaded(), x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], inner), dtype=x.dtype)
    sizes = (out.numel() // inner, inner, DTYPES[x.dtype], isa_number(library), torch.get_num_threads())
    raise_for(library.handle.vstar_geglu(ctypes.byref(GegluArguments(x.data_ptr(), out.data_ptr(), *sizes))))
    return out


def groupnorm_silu(rows: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """Normalises contiguous rows (N, ..., C) over each item's groups of channels."""
    library, out = loaded(), torch.empty_like(rows)
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    items, channels = rows.shape[0], rows.shape[-1]
    arguments = GroupNormArguments(
        *(x.data_ptr() for x in (rows, weight, bias, out)),
        *(items, rows.numel() // items // channels, channels, groups, eps),
        *(DTYPES[rows.dtype], silu, isa_number(library), torch.get_num_threads()),
    )
    raise_for(library.handle.vstar_groupnorm_silu(ctypes.byref(arguments)))
    return out


def _linear_arguments(problem: LinearProblem, out: Tensor) -> LinearArguments:
    given = (problem.x, problem.weight, problem.bias, problem.residual, problem.gain, problem.shift, out)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in given]
    features, width = problem.weight.shape
    sizes = (out.numel() // out.shape[-1], width, features, problem.gate, isa_number(loaded()), torch.get_num_threads())
    return LinearArguments(*pointers, *sizes, problem.eps)


def linear(problem: LinearProblem) -> Tensor:
    """Computes a problem of contiguous float32 tensors."""
    out = torch.empty(problem.out_shape, dtype=problem.x.dtype)
    raise_for(loaded().handle.vstar_linear(ctypes.byref(_linear_arguments(problem, out))))
    return out


def feed_forward(
    x: Tensor, first: tuple[Tensor, Tensor | None], second: tuple[Tensor, Tensor | None], norm: LayerNorm
) -> Tensor:
    """Returns x + second(geglu(first(norm(x)))) for contiguous float32 x (..., width)."""
    out = torch.empty_like(x)
    arguments = LinearPairArguments(
        _linear_arguments(LinearProblem(x, *first, None, True, *norm), out),
        _linear_arguments(LinearProblem(x, *second, x), out),
    )
    raise_for(loaded().handle.vstar_linear_pair(ctypes.byref(arguments)))
    return out
