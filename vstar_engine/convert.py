"""Official checkpoints to safetensors folders, pickled LoRAs to files: validated, streamed, atomic, in a child that is watched.

A pickle is read with `weights_only=True` and in no other way; the child's private memory is limited, so that a hostile or
damaged file can neither run code nor fill the machine.
"""

import argparse
import json
import logging
import math
import pickle
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import config, schedule, threads
from .artifacts import MANIFEST, WEIGHTS, check_writable, sha256, write_aside, write_manifest
from .checkpoint import check_finite, check_keys, official_shapes
from .device import dtype_named
from .errors import CheckpointError, OutputError

log = logging.getLogger(__name__)

LORA_FILE = ".safetensors"  # an output of this ending is a LoRA
GUIDANCE = 7.5  # what T2V-Turbo's own demonstration tells its UNet
SHARD_BYTES = 512 * 2**20
# what the child may hold besides mapped files: PyTorch itself, one shard, and casts of its largest tensor
CHILD_BYTES = 2 * 2**30
MODULE_PREFIX_LENGTH = 16  # `_forward_module.` of a {"module": ...} file


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
    config.model_named(model)
    dtype_named(dtype)
    if shard_bytes < 2**20:
        raise ValueError(f"a shard must be at least {2**20} bytes, got {shard_bytes}")
    sniff(source)
    check_writable(out, force, made=(MANIFEST, "model*.safetensors"))
    with write_aside(out, folder=True) as aside:
        command = [
            sys.executable,
            "-m",
            "vstar_engine.convert",
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
    config.model_named(model)
    if not math.isfinite(guidance):
        raise ValueError(f"the embedded guidance must be a finite number, got {guidance}")
    sniff(source)
    check_writable(out, force)
    with write_aside(out) as aside:
        command = [sys.executable, "-m", "vstar_engine.lora_list", str(source.absolute()), str(aside), model, str(guidance)]
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
    """Gives the child's memory limit in bytes: a zip or safetensors file is mapped, an old-style pickle is held whole."""
    mapped = zipfile.is_zipfile(source) or source.suffix == ".safetensors"
    return CHILD_BYTES + (0 if mapped else source.stat().st_size)


def _watch(command: list[str], source: Path, limit: int, on_progress: Callable[[int, int], None] | None) -> None:
    import psutil

    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
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


def read_official(source: Path) -> Mapping[str, Tensor]:
    """Opens an official checkpoint's tensors without running any code from it; CheckpointError says why it cannot be."""
    if source.suffix == ".safetensors":
        try:
            file = safe_open(source, "pt")
        except SafetensorError as error:
            raise CheckpointError(f"{source} is not a whole safetensors file ({error})") from error
        return LazyTensors(file)
    return unwrap(read_pickle(source), source)


def read_pickle(source: Path) -> Any:
    """Reads what a pickle of tensors holds without running any code from it; CheckpointError says why it cannot be."""
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise CheckpointError(
            f"{source} holds something other than tensors, which is never executed ({reason}); save only its state_dict"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise CheckpointError(f"{source} is damaged or cut short ({str(error).splitlines()[0]}); download it again") from error


class LazyTensors(Mapping[str, Tensor]):
    """A safetensors file as a mapping that reads a tensor when it is asked for."""

    def __init__(self, file: Any):
        self.file = file
        self.names = list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def unwrap(content: Any, source: Path) -> dict[str, Tensor]:
    """Takes the tensors out of a Lightning file, a {"module": ...} file or a bare state dict."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    elif isinstance(content, Mapping) and isinstance(content.get("module"), Mapping):
        content = {name[MODULE_PREFIX_LENGTH:]: value for name, value in content["module"].items()}
    if not isinstance(content, Mapping) or not content:
        hint = f"; if that is a LoRA, name a file to make of it, NAME{LORA_FILE}" if isinstance(content, list) else ""
        raise CheckpointError(f"{source} holds no state dict but {type(content).__name__}{hint}")
    stray = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if stray:
        raise CheckpointError(f"{source} holds entries that are no tensors, such as {stray[0]}")
    return dict(content)


def write_shards(tensors: Mapping[str, Tensor], out: Path, dtype: torch.dtype, shard_bytes: int) -> Iterator[int]:
    """Writes tensors as safetensors files of at most `shard_bytes` (or one tensor) each, yielding how many are done."""
    shards: list[dict[str, Tensor]] = [{}]
    size = written = 0
    for done, (name, tensor) in enumerate(tensors.items(), 1):
        check_finite(name, tensor)
        kept = tensor.to(dtype, copy=True).contiguous()
        check_finite(name, kept)
        if shards[0] and size + kept.nbytes > shard_bytes:
            written += 1
            _save(shards.pop(), out / f"model-{written:05d}.safetensors")
            shards, size = [{}], 0
        shards[0][name] = kept
        size += kept.nbytes
        yield done
    _save(shards.pop(), out / (f"model-{written + 1:05d}.safetensors" if written else "model.safetensors"))


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OutputError(f"cannot write {path.name}: {error}") from error


def compare_schedule(tensors: Mapping[str, Tensor]) -> str | None:
    """Says so when a checkpoint was trained with another noise schedule than the one sampling uses."""
    for name in ("alphas_cumprod", "scale_arr"):
        wanted = torch.from_numpy(schedule.buffers()[name])
        if not torch.allclose(tensors[name].double(), wanted, rtol=5e-3, atol=5e-4):  # files may hold float16
            return f"the checkpoint's {name} differs from the schedule that sampling uses; videos may come out wrong"
    return None


def _child(source: Path, out: Path, model: str, dtype: str, shard_bytes: int) -> None:
    spec = config.model_named(model)
    tensors = read_official(source)
    wanted = official_shapes(spec)
    check_keys({name: tuple(tensors[name].shape) for name in tensors}, wanted, str(source))
    warning = compare_schedule(tensors)
    for done in write_shards(tensors, out, dtype_named(dtype), shard_bytes):
        if done % 50 == 0 or done == len(tensors):
            print(json.dumps({"done": done, "total": len(tensors)}), flush=True)
    source_entry = {"name": source.name, "bytes": source.stat().st_size, "sha256": sha256(source)}
    try:
        write_manifest(out, {"kind": WEIGHTS, "model": model, "dtype": dtype, "source": source_entry})
    except OSError as error:
        raise OutputError(f"cannot write the manifest: {error.strerror}") from error
    if warning:
        print(json.dumps({"warning": warning}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vstar_engine.convert")
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("dtype")
    parser.add_argument("shard_bytes", type=int)
    with reported():
        _child(**vars(parser.parse_args()))


@contextmanager
def reported() -> Iterator[None]:
    """Tells the process that watches of an error."""
    try:
        yield
    except (CheckpointError, OutputError) as error:
        print(json.dumps({"error": str(error), "kind": type(error).__name__}), flush=True)


if __name__ == "__main__":
    main()
