"""Official checkpoints to safetensors folders, pickled LoRAs to files: validated, streamed, atomic, in a child that is watched.

A pickle is read with `weights_only=True` and in no other way; the child's private memory is limited, so that a hostile or
damaged file can neither run code nor fill the machine.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vstar_engine.artifacts.file_kind import PICKLE, SAFETENSORS, weight_kind
from vstar_engine.artifacts.files import check_writable, write_aside
from vstar_engine.artifacts.manifest import MANIFEST
from vstar_engine.config import models
from vstar_engine.errors import CheckpointError
from vstar_engine.machine.device import dtype_named

from .converted import STORED
from .diffusers_files import INDEX, is_layout, used_files
from .watched_child import run_watched

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
    about: Mapping[str, Any] | None = None,
    parts: Path | None = None,
) -> Path:
    """Converts an official checkpoint (.ckpt, .pt or .safetensors) or a diffusers folder to a folder that `Engine.load` reads.

    `dtype` "stored" keeps the source's. `parts` is the folder of weights that a UNet alone takes the rest from. `about` goes
    into the manifest, to the source's name and sha256. `on_progress` is called with (tensors done, tensors in all). Raises
    CheckpointError for a source that cannot be converted and OutputError when `out` cannot be written; neither leaves anything
    behind.
    """
    models.model_named(model)
    if dtype != STORED:
        dtype_named(dtype)
    if shard_bytes < 2**20:
        raise ValueError(f"a shard must be at least {2**20} bytes, got {shard_bytes}")
    if source.is_dir() and not is_layout(source):
        raise CheckpointError(f"{source} is a folder without {INDEX}; a diffusers folder has one, or give a checkpoint file")
    limit = memory_limit or child_limit(source)
    check_writable(out, force, made=(MANIFEST, "model*.safetensors"))
    with write_aside(out, folder=True) as aside:
        arguments: dict[str, Any] = {"source": str(source.absolute()), "out": str(aside), "model": model, "dtype": dtype}
        arguments |= {"shard_bytes": shard_bytes, "about": dict(about or {}), "parts": None if parts is None else str(parts)}
        run_watched("convert_child", arguments, source, limit, on_progress)
        if not (aside / MANIFEST).is_file():
            raise CheckpointError(f"the conversion of {source} ended without a {MANIFEST}, so nothing is kept of it")
    return out


def convert_lora(
    source: Path,
    out: Path,
    model: str = "videocrafter2",
    guidance: float = GUIDANCE,
    force: bool = False,
    memory_limit: int | None = None,
) -> Path:
    """Converts a pickled LoRA to a file that `--lora` takes: a dictionary of named matrices, or a bare list (T2V-Turbo's).

    Of a list, `guidance` is the scale that its UNet is told, where it was trained to take one. Raises CheckpointError with one
    sentence for whatever is wrong with the file, OutputError when `out` cannot be written; nothing is left behind then.
    """
    models.model_named(model)
    if not math.isfinite(guidance):
        raise ValueError(f"the embedded guidance must be a finite number, got {guidance}")
    if weight_kind(source, "LoRA") == SAFETENSORS:
        raise CheckpointError(f"{source} is a safetensors file already; give it to --lora as it is")
    check_writable(out, force)
    with write_aside(out) as aside:
        arguments = {"source": str(source.absolute()), "out": str(aside), "model": model, "guidance": guidance}
        run_watched("lora_child", arguments, source, memory_limit or CHILD_BYTES + 2 * source.stat().st_size)
        if not aside.is_file():
            raise CheckpointError(f"the conversion of {source} ended without a file, so nothing is kept of it")
    return out


def child_limit(source: Path) -> int:
    """Returns the child's memory limit in bytes: a zip or safetensors file is mapped, an old-style pickle is held whole."""
    read = used_files(source) if source.is_dir() else [source]
    held = (path for path in read if path.suffix != ".json" and path.suffix != ".txt")
    return CHILD_BYTES + sum(path.stat().st_size for path in held if weight_kind(path) == PICKLE)
