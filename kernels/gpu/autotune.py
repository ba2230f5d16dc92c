"""The fastest of several candidates that compute the same, timed once for each case on the device they run on.

As cuDNN's benchmark mode chooses among its algorithms. While a CUDA graph is captured nothing can be timed: then the candidate
chosen before runs, or the first one. Candidates round differently, so a choice is stored for later processes, which then
compute the same to the bit. Where PyTorch is told to be deterministic the first candidate runs, as none may depend on time.

$VSTAR_CACHE/autotune/<hash>.json: {"of": {"devices", "torch", "cuda", "triton", "kernels"}, "chosen": {case: candidate}}

The hash is of what the choices are for: other GPUs, libraries or kernels have a file of their own. $VSTAR_CACHE defaults to
vstar-engine in the user's cache folder. A file that is damaged or cannot be written is logged and ignored.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Container, Hashable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from vstar_engine.kernels.source_hash import kernel_hash

log = logging.getLogger(__name__)

# calls that load and compile what they run, and calls that are timed, of which the fastest counts
WARM, ROUNDS = 2, 5
T = TypeVar("T")
Candidates = Mapping[str, Callable[[], T]]

chosen: dict[Hashable, str] = {}


def gpu_seconds(call: Callable[[], object]) -> float:
    """Returns the time that a call takes the current GPU's stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def capturing() -> bool:
    """Returns whether operators are being captured as a CUDA graph instead of run."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def measure(candidates: Candidates[T], seconds: Callable[[Callable[[], object]], float]) -> dict[str, float]:
    """Times the candidates in turn; returns the least seconds of each."""
    for call in candidates.values():
        for _ in range(WARM):
            call()
    rounds = [{name: seconds(call) for name, call in candidates.items()} for _ in range(ROUNDS)]
    return {name: min(times[name] for times in rounds) for name in candidates}


def choose(case: Hashable, candidates: Candidates[T], seconds: Callable[[Callable[[], object]], float]) -> str:
    """Times the candidates and stores the name of the fastest."""
    times = measure(candidates, seconds)
    log.info("%s: %s", case, ", ".join(f"{name} {1e6 * took:.0f} us" for name, took in times.items()))
    return stored().add(str(case), min(times, key=times.__getitem__), candidates)


def autotune(case: Hashable, candidates: Candidates[T], seconds: Callable[[Callable[[], object]], float] = gpu_seconds) -> T:
    """Runs the fastest candidate for a case; a lone candidate is never timed."""
    first = next(iter(candidates))
    if len(candidates) == 1 or torch.are_deterministic_algorithms_enabled():
        return candidates[first]()
    if case not in chosen and not capturing():
        before = stored().chosen.get(str(case), "")
        chosen[case] = before if before in candidates else choose(case, candidates, seconds)
    return candidates[chosen.get(case, first)]()


def made_for() -> dict[str, Any]:
    """Returns what choices depend on: the GPUs in their order, the libraries, and the kernels' sources."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton}
    return {"devices": devices, **versions, "kernels": kernel_hash()}


def cache_folder() -> Path:
    """Returns VSTAR_CACHE, else a folder in the user's cache; a user without a home has a temporary one."""
    if named := os.environ.get("VSTAR_CACHE"):
        return Path(named)
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        base = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    return base / "vstar-engine"


class Choices:
    """The choices stored for this machine."""

    def __init__(self) -> None:
        folder = cache_folder()
        self.of = made_for()
        name = hashlib.sha256(json.dumps(self.of, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / "autotune" / f"{name}.json"
        self.chosen = self._read()
        self.writable = True

    def _read(self) -> dict[str, str]:
        try:
            content = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            log.warning("%s cannot be read (%s): kernels are timed again", self.path, error)
            return {}
        chosen = content.get("chosen") if isinstance(content, dict) and content.get("of") == self.of else None
        if not isinstance(chosen, dict) or not all(isinstance(name, str) for name in chosen.values()):
            log.warning("%s holds no choices for this machine: kernels are timed again", self.path)
            return {}
        return chosen

    def add(self, case: str, name: str, candidates: Container[str]) -> str:
        """Stores a choice and returns it, or the one of these candidates that another process has stored meanwhile."""
        theirs = self._read() if self.writable else {}
        mine = {} if theirs.get(case) in candidates else {case: name}
        self.chosen = {**self.chosen, **theirs, **mine}
        if self.writable:
            self._write()
        return self.chosen[case]

    def _write(self) -> None:
        aside = self.path.with_suffix(f".{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps({"of": self.of, "chosen": self.chosen}, indent=1, sort_keys=True) + "\n")
            os.replace(aside, self.path)
        except OSError as error:
            self.writable = False
            log.warning("%s cannot be written (%s): the next process times kernels again", self.path, error.strerror)


stored = cache(Choices)
