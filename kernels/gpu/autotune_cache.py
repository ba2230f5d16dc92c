"""Choices made by time that outlive the process, so that what one process computes the next computes to the bit.

$VSTAR_CACHE/fastest/<hash>.json: {"of": {"devices", "torch", "cuda", "triton", "kernels"}, "chosen": {case: way}}

The hash is of what the choices are for: other GPUs, libraries or kernels choose anew, in a file of their own. In place of
$VSTAR_CACHE, vstar-engine in the user's cache folder. A file that is damaged or cannot be written is named and done without.
"""

import hashlib
import json
import logging
import os
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch

from vstar_engine.kernels.source_hash import kernel_hash

log = logging.getLogger(__name__)


def made_for() -> dict[str, Any]:
    """Says what choices depend on: the GPUs in their order, the libraries, and the kernels' sources."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton}
    return {"devices": devices, **versions, "kernels": kernel_hash()}


class Choices:
    """The choices for this machine, read when they are first asked for."""

    def __init__(self) -> None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = Path(os.environ.get("VSTAR_CACHE") or base / "vstar-engine")
        self.of = made_for()
        name = hashlib.sha256(json.dumps(self.of, sort_keys=True).encode()).hexdigest()[:16]
        self.path = cache / "fastest" / f"{name}.json"
        self.chosen = self._read()
        self.writable = True

    def _read(self) -> dict[str, str]:
        try:
            content = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            log.warning("%s cannot be read (%s): the fastest kernels are chosen anew", self.path, error)
            return {}
        chosen = content.get("chosen") if isinstance(content, dict) and content.get("of") == self.of else None
        if not isinstance(chosen, dict) or not all(isinstance(way, str) for way in chosen.values()):
            log.warning("%s holds no choices for this machine: the fastest kernels are chosen anew", self.path)
            return {}
        return chosen

    def add(self, case: str, way: str, among: Container[str]) -> str:
        """Keeps a choice and gives it, or the one among the same ways that another process has made meanwhile."""
        theirs = self._read() if self.writable else {}
        mine = {} if theirs.get(case) in among else {case: way}
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
            log.warning(
                "%s cannot be written (%s): the next process chooses the fastest kernels anew", self.path, error.strerror
            )
