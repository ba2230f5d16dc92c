"""Official checkpoints to safetensors folders, pickled LoRAs to files: validated, streamed, atomic, in a child that is watched.

A pickle is read with `weights_only=True` and in no other way; the child's private memory is limited, so that a hostile or
damaged file can neither run code nor fill the machine.
"""

import json
import logging
import math
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vstar_engine.artifacts.files import check_writable, write_aside
from vstar_engine.artifacts.manifest import MANIFEST
from vstar_engine.config import models
from vstar_engine.errors import CheckpointError, OutputError
from vstar_engine.machine import threads
from vstar_engine.machine.device import dtype_named

log = logging.getLogger(__name__)

LORA_FILE = ".safetensors"  # an output of this ending is a LoRA
GUIDANCE = 7.5  # what T2V-Turbo's own demonstration tells its UNet
SHARD_BYTES = 512 * 2**20
# what the child may hold besides mapped files: PyTorch itself, one shard, and casts of its largest tensor
CHILD_BYTES = 2 * 2**30


def convert(
    source: Path,
    out: Path,
    model: str = "videocrafter2",
    dtype: str = "float16",
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    memory_limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Converts an official checkpoint (.ckpt, .pt or .safetensors) to a folder that `Engine.load` reads.

    `on_progress` hears (tensors done, tensors in all). Raises CheckpointError with one sentence for whatever is wrong with the
    file, OutputError when `out` cannot be written; nothing is left behind then.
    """
    models.model_named(model)
    dtype_named(dtype)
    if shard_bytes < 2**20:
        raise ValueError(f"a shard must be at least {2**20} bytes, got {shard_bytes}")
    sniff(source)
    check_writable(out, force, made=(MANIFEST, "model*.safetensors"))
    with write_aside(out, folder=True) as aside:
        command = [
            sys.executable,
            "-m",
            "vstar_engine.weights.convert_child",
            str(source.absolute()),
            str(aside),
            model,
            dtype,
            str(shard_bytes),
        ]
        _watch(command, source, memory_limit or child_limit(source), on_progress)
    return out


def convert_lora(
    source: Path,
    out: Path,
    model: str = "videocrafter2",
    guidance: float = GUIDANCE,
    force: bool = False,
    memory_limit: int | None = None,
) -> Path:
    """Converts a LoRA saved as a bare list, such as T2V-Turbo's `unet_lora.pt`, to a file that `--lora` takes.

    `guidance` is the scale that its UNet is told, where it was trained to take one. Raises CheckpointError with one sentence
    for whatever is wrong with the file, OutputError when `out` cannot be written; nothing is left behind then.
    """
    models.model_named(model)
    if not math.isfinite(guidance):
        raise ValueError(f"the embedded guidance must be a finite number, got {guidance}")
    sniff(source)
    check_writable(out, force)
    with write_aside(out) as aside:
        command = [
            sys.executable,
            "-m",
            "vstar_engine.weights.turbo_lora",
            str(source.absolute()),
            str(aside),
            model,
            str(guidance),
        ]
        _watch(command, source, memory_limit or CHILD_BYTES + 2 * source.stat().st_size, None)
    return out


def sniff(source: Path) -> None:
    """Raises CheckpointError for a file that is recognisably no checkpoint."""
    if not source.is_file():
        raise CheckpointError(f"no checkpoint at {source}")
    try:
        with source.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"cannot read {source}: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"{source} is empty; download it again")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(f"{source} is a web page, not a checkpoint; download the file itself")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{source} is a Git LFS pointer, not the checkpoint; fetch the file itself")
    if head.startswith(b"PK") and not zipfile.is_zipfile(source):
        raise CheckpointError(f"{source} is cut short; download it again")


def child_limit(source: Path) -> int:
    """Returns the child's memory limit in bytes: a zip or safetensors file is mapped, an old-style pickle is held whole."""
    mapped = zipfile.is_zipfile(source) or source.suffix == ".safetensors"
    return CHILD_BYTES + (0 if mapped else source.stat().st_size)


def _watch(command: list[str], source: Path, limit: int, on_progress: Callable[[int, int], None] | None) -> None:
    import psutil

    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
        env=threads.environment(),
    )
    assert child.stdout is not None
    assert child.stderr is not None
    report: dict[str, Any] = {}
    complaint: list[str] = []

    def listen(lines: Any) -> None:
        for line in lines:
            message = json.loads(line)
            if "done" in message and on_progress:
                on_progress(message["done"], message["total"])
            report.update(message)

    ears = [
        threading.Thread(target=listen, args=(child.stdout,)),
        threading.Thread(target=complaint.extend, args=(child.stderr,)),
    ]
    for ear in ears:
        ear.start()
    try:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            held = _private_bytes(process)
            if held > limit:
                raise CheckpointError(
                    f"reading {source} took {held / 2**20:.0f} MiB where {limit / 2**20:.0f} MiB should do, so it was stopped; "
                    "it is no ordinary checkpoint, or --memory-limit must be raised"
                )
            time.sleep(0.02)
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
        for ear in ears:
            ear.join()
    if "warning" in report:
        log.warning(report["warning"])
    if "error" in report:
        raise {"CheckpointError": CheckpointError, "OutputError": OutputError}[report["kind"]](report["error"])
    if child.returncode:
        last = complaint[-1].strip() if complaint else f"exit status {child.returncode}"
        raise CheckpointError(f"{source} could not be read as a checkpoint: {last}")


def _private_bytes(process: Any) -> int:
    import psutil

    try:
        memory = process.memory_info()
    except psutil.NoSuchProcess:
        return 0
    return memory.rss - getattr(memory, "shared", 0)  # mapped pages of the file itself can be dropped at any time
