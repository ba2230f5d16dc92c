"""The ops on a CPU by the package's C++ library (csrc/cpu), loaded with ctypes.

The library is looked for in the files of the installed distribution, not beside this module: in a checkout's folder the
checkout's modules shadow the installed ones. Without it the references take over, with one warning; `status` says why.
"""

import ctypes
import json
import logging
import os
import warnings
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
from torch import Tensor
from torch.nn import Parameter

DISTRIBUTION = "vstar-engine"
LIBRARY = "libvstar_cpu.so"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STATUS = {1: "an argument is out of range", 2: "out of memory", 3: "this machine lacks that instruction set"}

log = logging.getLogger(__name__)


class Arguments(ctypes.Structure):
    """`struct vstar_attention` of csrc/cpu/attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "bias")),
        *((name, ctypes.c_int64) for name in ("batch", "frames", "keys", "positions", "heads", "head_dim", "bias_batch")),
        *((name, ctypes.c_int64 * 4) for name in ("q_stride", "k_stride", "v_stride", "out_stride")),
        *((name, ctypes.c_int32) for name in ("dtype", "dense", "isa", "threads")),
    )


class GegluArguments(ctypes.Structure):
    """`struct vstar_geglu_arguments` of csrc/cpu/fused.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "inner")),
        *((name, ctypes.c_int32) for name in ("dtype", "isa", "threads")),
    )


class GroupNormArguments(ctypes.Structure):
    """`struct vstar_groupnorm_silu_arguments` of csrc/cpu/fused.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("items", "rows", "channels", "groups")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("dtype", "silu", "isa", "threads")),
    )


class LinearArguments(ctypes.Structure):
    """`struct vstar_linear_arguments` of csrc/cpu/fused.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "residual", "norm_gain", "norm_shift", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "in_features", "out_features")),
        *((name, ctypes.c_int32) for name in ("gate", "isa", "threads")),
        ("eps", ctypes.c_float),
    )


class LinearPairArguments(ctypes.Structure):
    """`struct vstar_linear_pair_arguments` of csrc/cpu/fused.h."""

    _fields_ = (("first", LinearArguments), ("second", LinearArguments))


# in the order in which `vstar_size_of` counts them
CALLS: dict[str, type[ctypes.Structure]] = {
    "vstar_temporal_attention": Arguments,
    "vstar_geglu": GegluArguments,
    "vstar_groupnorm_silu": GroupNormArguments,
    "vstar_linear": LinearArguments,
    "vstar_linear_pair": LinearPairArguments,
}


@dataclass(frozen=True)
class Library:
    """The loaded library and the instruction sets it runs on this machine, plainest first."""

    path: Path
    handle: ctypes.CDLL
    isas: tuple[str, ...]


def _installed() -> list[Path]:
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return []
    files = distribution.files or []
    return [Path(str(distribution.locate_file(file))) for file in files if file.name == LIBRARY]


def _missing() -> str:
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return f"{DISTRIBUTION} is not installed, so the checkout has no built library: pip install ."
    origin = json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "")
    where = f" from {url2pathname(urlparse(origin).path)}" if origin.startswith("file:") else ""
    return f"{DISTRIBUTION} was installed{where} without {LIBRARY}: no working C++ compiler; install one and reinstall"


@cache
def _load() -> Library | str:
    """Gives the library, or the sentence that says why there is none."""
    paths = [path for path in _installed() if path.exists()]
    if not paths:
        return _missing()
    try:
        handle = ctypes.CDLL(str(paths[0]))
        handle.vstar_size_of.restype = ctypes.c_int64
        for number, (name, arguments) in enumerate(CALLS.items()):
            getattr(handle, name).argtypes = (ctypes.POINTER(arguments),)
            if handle.vstar_size_of(number) != ctypes.sizeof(arguments):
                return f"{paths[0]} was built from other sources than these: {name} takes other arguments; reinstall"
        handle.vstar_isa_name.restype = ctypes.c_char_p
    except OSError as error:
        return f"{paths[0]} does not load: {error}"
    except AttributeError as error:
        return f"{paths[0]} was built from other sources than these: {error}; reinstall"
    names = [handle.vstar_isa_name(i) for i in range(3)]
    return Library(paths[0], handle, tuple(name.decode() for name in names if name))


@cache
def _warn(reason: str) -> None:
    message = f"temporal attention runs by the slow PyTorch reference, norms and gates by PyTorch: {reason}"
    log.warning(message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def status() -> tuple[bool, str]:
    """Says whether the native CPU kernel is there, and which one or why not."""
    library = _load()
    if isinstance(library, str):
        return False, library
    return True, f"{library.path} ({library.isas[_isa(library)]})"


def _isa(library: Library) -> int:
    chosen = os.environ.get("VSTAR_CPU_ISA", library.isas[-1])
    if chosen not in library.isas:
        raise ValueError(f"VSTAR_CPU_ISA must be one of {', '.join(library.isas)} on this machine, got {chosen}")
    return library.isas.index(chosen)


def serves(q: Tensor) -> bool:
    """Says whether the library takes q: its dtype, its device, and the library being there; warns once if only that fails."""
    if q.device.type != "cpu" or q.dtype not in DTYPES:
        return False
    library = _load()
    if isinstance(library, str):
        _warn(library)
        return False
    return True


def unwatched(x: Tensor) -> bool:
    """Says whether a call on x may go past torch's dispatcher, which takes longer than some of the ops themselves: nobody asks
    for gradients, traces, or looks on, and x is no other kind of tensor."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch.autograd._profiler_enabled()
    ) and type(x) in (Tensor, Parameter)


def _library() -> Library:
    library = _load()
    assert isinstance(library, Library)
    return library


def _raise_for(failure: int) -> None:
    if failure:
        raise MemoryError(STATUS[failure]) if failure == 2 else RuntimeError(STATUS[failure])


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Runs checked arguments of `temporal_attention` (bias = g) or `temporal_attention_dense` (bias = G, three axes)."""
    library = _library()
    out = torch.empty(q.shape, dtype=q.dtype)
    bias = bias.contiguous()
    batch, frames, positions, heads, head_dim = q.shape
    arguments = Arguments(
        *(x.data_ptr() for x in (q, k, v, out, bias)),
        *(batch, frames, k.shape[1], positions, heads, head_dim, bias.shape[0]),
        *(x.stride()[:4] for x in (q, k, v, out)),
        *(DTYPES[q.dtype], bias.dim() == 3, _isa(library), torch.get_num_threads()),
    )
    _raise_for(library.handle.vstar_temporal_attention(ctypes.byref(arguments)))
    return out


def geglu(x: Tensor) -> Tensor:
    """Gates contiguous x (..., 2 * inner) -> (..., inner)."""
    library, inner = _library(), x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], inner), dtype=x.dtype)
    sizes = (out.numel() // inner, inner, DTYPES[x.dtype], _isa(library), torch.get_num_threads())
    _raise_for(library.handle.vstar_geglu(ctypes.byref(GegluArguments(x.data_ptr(), out.data_ptr(), *sizes))))
    return out


def groupnorm_silu(rows: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """Normalises contiguous rows (N, ..., C) over each item's groups of channels."""
    library, out = _library(), torch.empty_like(rows)
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    items, channels = rows.shape[0], rows.shape[-1]
    arguments = GroupNormArguments(
        *(x.data_ptr() for x in (rows, weight, bias, out)),
        *(items, rows.numel() // items // channels, channels, groups, eps),
        *(DTYPES[rows.dtype], silu, _isa(library), torch.get_num_threads()),
    )
    _raise_for(library.handle.vstar_groupnorm_silu(ctypes.byref(arguments)))
    return out


def _linear_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: bool,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    out: Tensor,
) -> LinearArguments:
    given = (x, weight, bias, residual, gain, shift, out)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in given]
    features, width = weight.shape
    return LinearArguments(
        *pointers, out.numel() // out.shape[-1], width, features, gate, _isa(_library()), torch.get_num_threads(), eps
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: bool,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> Tensor:
    """Norms contiguous float32 x (..., in), multiplies by weight (out, in), adds bias and residual, or gates half by half."""
    features = weight.shape[0]
    out = torch.empty((*x.shape[:-1], features // 2 if gate else features), dtype=x.dtype)
    arguments = _linear_arguments(x, weight, bias, residual, gate, gain, shift, eps, out)
    _raise_for(_library().handle.vstar_linear(ctypes.byref(arguments)))
    return out


def feed_forward(
    x: Tensor,
    first: tuple[Tensor, Tensor | None],
    second: tuple[Tensor, Tensor | None],
    gain: Tensor,
    shift: Tensor,
    eps: float,
) -> Tensor:
    """Adds to contiguous float32 x (..., width) what two layers, each (weight, bias), make of it, normed; the first gates."""
    out = torch.empty_like(x)
    arguments = LinearPairArguments(
        _linear_arguments(x, *first, None, True, gain, shift, eps, out),
        _linear_arguments(x, *second, x, False, None, None, 0.0, out),
    )
    _raise_for(_library().handle.vstar_linear_pair(ctypes.byref(arguments)))
    return out
