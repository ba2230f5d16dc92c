"""The process that reads a checkpoint: it is watched, and runs no code of the file."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vstar_engine.artifacts.file_kind import SAFETENSORS, weight_kind
from vstar_engine.artifacts.manifest import WEIGHTS, write_manifest
from vstar_engine.config import models
from vstar_engine.errors import CheckpointError, OutputError
from vstar_engine.machine.device import dtype_named
from vstar_engine.sampling import schedule

from .checkpoint import Weights, check_finite, check_keys
from .convert import LORA_FILE
from .converted import STORED
from .diffusers_files import is_pipeline, sha256_of, used_files
from .diffusers_layout import open_layout
from .key_map import UNET, official_shapes
from .pickle_file import Streamed, read_pickle
from .streaming_keys import STREAMING_KEY, published_shapes
from .unet_alone import completed
from .watched_child import Tell, reporting
from .wrappers import Renamed, state_dict_in, stored_names

# by name: as a process this module is called __main__
log = logging.getLogger("vstar_engine.weights.convert_child")


def read_official(source: Path) -> Mapping[str, Tensor]:
    """Opens an official checkpoint's tensors without running any code from it; CheckpointError says why it cannot be."""
    if weight_kind(source) == SAFETENSORS:
        return Weights(source)
    content = read_pickle(source)
    hint = f"; if that is a LoRA, name a file to make of it, NAME{LORA_FILE}" if isinstance(content, list) else ""
    tensors: Mapping[str, Tensor] = state_dict_in(content, str(source), hint)
    if any(isinstance(tensor, FakeTensor) for tensor in tensors.values()):
        tensors = Streamed(source, tensors)
    return Renamed(tensors, stored_names(tensors, str(source)))


def write_shards(tensors: Mapping[str, Tensor], out: Path, dtype: torch.dtype | None, shard_bytes: int) -> Iterator[int]:
    """Writes tensors as safetensors files of at most `shard_bytes` (or one tensor) each, yielding how many are done.

    Without a dtype each tensor keeps its own; float64 becomes float32.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = written = 0
    for done, (name, tensor) in enumerate(tensors.items(), 1):
        check_finite(name, tensor)
        kept = tensor.to(dtype or narrow(tensor.dtype), copy=True).contiguous()
        check_finite(name, kept)
        if shards[0] and size + kept.nbytes > shard_bytes:
            written += 1
            _save(shards.pop(), out / f"model-{written:05d}.safetensors")
            shards, size = [{}], 0
        shards[0][name] = kept
        size += kept.nbytes
        yield done
    _save(shards.pop(), out / (f"model-{written + 1:05d}.safetensors" if written else "model.safetensors"))


def narrow(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that weights of a dtype are kept in: their own, or float32 for float64."""
    return torch.float32 if dtype == torch.float64 else dtype


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OutputError(f"cannot write {path.name}: {error}") from error


def compare_schedule(tensors: Mapping[str, Tensor]) -> None:
    """Warns when a checkpoint was trained with another noise schedule than the one sampling uses."""
    for name in ("alphas_cumprod", "scale_arr"):
        wanted = torch.from_numpy(schedule.buffers()[name])
        if not torch.allclose(tensors[name].double(), wanted, rtol=5e-3, atol=5e-4):  # files may hold float16
            log.warning("the checkpoint's %s differs from the schedule that sampling uses; videos may come out wrong", name)
            return


def check_official(tensors: Mapping[str, Tensor], spec: models.Spec, source: Path) -> None:
    """Raises CheckpointError unless a file holds a model's tensors; warns where its noise schedule is another."""
    if spec.streaming is None and STREAMING_KEY in tensors:
        raise CheckpointError(f"{source} is a checkpoint of StreamingT2V, not of {spec.name}; give --model streaming-t2v")
    wanted = official_shapes(spec) if spec.streaming is None else published_shapes(spec)
    check_keys({name: tuple(tensors[name].shape) for name in tensors}, wanted, str(source))
    if spec.streaming is None:
        compare_schedule(tensors)


def convert_here(
    source: Path,
    out: Path,
    model: str,
    dtype: str,
    shard_bytes: int,
    tell: Tell,
    about: dict[str, Any],
    parts: str | None = None,
) -> None:
    """Writes the folder `out`, which is there and empty; its manifest comes last, with `about` among what made it.

    `parts` is the folder of weights that a UNet alone takes its autoencoder and its text tower from.
    """
    spec = models.model_named(model)
    stated: dict[str, Any] = {}
    tensors: Mapping[str, Tensor]
    if source.is_dir():
        spec, layout = open_layout(source, spec)
        spec, tensors = (spec, layout) if is_pipeline(source) else completed(spec, layout, source, parts)
        stated = {"networks": models.networks_as_json(spec)}
        read = used_files(source)
    else:
        tensors, read = read_official(source), [source]
        check_official(tensors, spec, source)
    kept = None if dtype == STORED else dtype_named(dtype)
    for done in write_shards(tensors, out, kept, shard_bytes):
        if done % 50 == 0 or done == len(tensors):
            tell(done=done, total=len(tensors))
    source_entry = {"name": source.name, "bytes": sum(file.stat().st_size for file in read)}
    source_entry["sha256"] = about.pop("sha256", None) or sha256_of(source, read)
    first = f"{UNET}input_blocks.0.0.weight"
    stored = tensors[first if first in tensors else next(iter(tensors))].dtype
    named = str(kept or narrow(stored)).removeprefix("torch.")
    whole = {"kind": WEIGHTS, "model": model, "dtype": named, **stated}
    try:
        write_manifest(out, {**whole, "source": {**source_entry, **about}})
    except OSError as error:
        raise OutputError(f"cannot write the manifest: {error.strerror}") from error


if __name__ == "__main__":
    with reporting() as (given, tell):
        convert_here(Path(given.pop("source")), Path(given.pop("out")), **given, tell=tell)
