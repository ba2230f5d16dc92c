"""The package's C++ library (csrc/cpu), found, checked and loaded with ctypes."""

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

from .arguments import CALLS

DISTRIBUTION = "vstar-engine"
LIBRARY = "libvstar_cpu.so"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STATUS = {1: "an argument is out of range", 2: "out of memory", 3: "this machine lacks that instruction set"}

log = logging.getLogger(__name__)


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
    """Returns the library, or a sentence that says why there is none."""
    paths = [path for path in _installed() if path.exists()]
    if not paths:
        return _missing()
    try:
        handle = ctypes.CDLL(str(paths[0]))
        handle.vstar_size_of.restype = ctypes.c_int64
        for number, (name, arguments) in enumerate(CALLS.items()):
            getattr(handle, name).argtypes = (ctypes.POINTER(arguments),)
            if handle.vstar_size_of(number) != ctypes.sizeof(arguments):
                return f"{paths[0]} was built from other sources: {name} takes other arguments; reinstall"
        handle.vstar_isa_name.restype = ctypes.c_char_p
    except OSError as error:
        return f"{paths[0]} does not load: {error}"
    except AttributeError as error:
        return f"{paths[0]} was built from other sources: {error}; reinstall"
    names = [handle.vstar_isa_name(i) for i in range(3)]
    return Library(paths[0], handle, tuple(name.decode() for name in names if name))


@cache
def _warn(reason: str) -> None:
    message = f"the C++ library is missing, so PyTorch computes attention, norms and gates, slowly: {reason}"
    log.warning(message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def status() -> tuple[bool, str]:
    """Returns whether the C++ library is there, and its path and instruction set, or why it is not."""
    library = _load()
    if isinstance(library, str):
        return False, library
    return True, f"{library.path} ({library.isas[isa_number(library)]})"


def isa_number(library: Library) -> int:
    """Returns the number of the instruction set to run: the best, or VSTAR_CPU_ISA."""
    chosen = os.environ.get("VSTAR_CPU_ISA", library.isas[-1])
    if chosen not in library.isas:
        raise ValueError(f"VSTAR_CPU_ISA must be one of {', '.join(library.isas)} on this machine, got {chosen}")
    return library.isas.index(chosen)


def serves(q: Tensor) -> bool:
    """Returns whether the library takes q's dtype and device; warns once where the library is missing."""
    if q.device.type != "cpu" or q.dtype not in DTYPES:
        return False
    library = _load()
    if isinstance(library, str):
        _warn(library)
        return False
    return True


def unwatched(x: Tensor) -> bool:
    """Returns whether the dispatcher can be skipped: no autograd, tracing, profiler or dispatch mode is active."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch.autograd._profiler_enabled()
    ) and type(x) in (Tensor, Parameter)


def loaded() -> Library:
    """Returns the library where `serves` found that there is one."""
    library = _load()
    assert isinstance(library, Library)
    return library


def raise_for(failure: int) -> None:
    """Raises for a status that is not success."""
    if failure:
        raise MemoryError(STATUS[failure]) if failure == 2 else RuntimeError(STATUS[failure])
