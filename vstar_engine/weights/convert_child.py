"""The process that reads a checkpoint: it is watched, and runs no code of the file."""

import argparse
import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vstar_engine.artifacts.files import sha256
from vstar_engine.artifacts.manifest import WEIGHTS, write_manifest
from vstar_engine.config import models
from vstar_engine.errors import CheckpointError, OutputError
from vstar_engine.machine.device import dtype_named
from vstar_engine.sampling import schedule

from .checkpoint import check_finite, check_keys
from .convert import LORA_FILE
from .key_map import official_shapes

MODULE_PREFIX_LENGTH = 16  # `_forward_module.` of a {"module": ...} file


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
    spec = models.model_named(model)
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
    parser = argparse.ArgumentParser(prog="python -m vstar_engine.weights.convert_child")
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
