"""Weights in the official key naming: the table official -> ours and a strict, streaming loader."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vstar_engine.artifacts.files import digest_of, sha256
from vstar_engine.artifacts.manifest import open_tensors, read_weights
from vstar_engine.config.models import TextSpec
from vstar_engine.errors import CheckpointError
from vstar_engine.networks.text_encoder import TextTower

from .key_map import TEXT, module_shapes, official_names
from .wrappers import stored_names

log = logging.getLogger(__name__)


# mapped pages stay resident while a file is open, so all are closed after this much
REOPEN_BYTES = 256 * 2**20
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Weights(Mapping[str, Tensor]):
    """The tensors of a converted folder or of one safetensors file, mapped from disk as they are asked for."""

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        self.manifest = read_weights(self.path)
        files = [self.path / entry["name"] for entry in self.manifest.get("files", ())] or [self.path]
        self._open: dict[Path, Any] = {}
        self._read = 0
        stored = {name: file for file in files for name in self._file(file).offset_keys()}
        self._where = {name: (stored[held], held) for name, held in stored_names(stored, str(self.path)).items()}

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = open_tensors(path, "pt")
        return self._open[path]

    def __getitem__(self, name: str) -> Tensor:
        if self._read > REOPEN_BYTES:
            self._open.clear()
            self._read = 0
        file, held = self._where[name]
        tensor = self._file(file).get_tensor(held)
        self._read += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def fingerprint(self) -> str:
        """Names the tensors by a hash of their files', which a folder's manifest states and was held to."""
        files = [(entry["name"], entry["sha256"]) for entry in self.manifest.get("files", ())]
        return digest_of(sorted(files)) if files else sha256(self.path)


def listing(names: list[str]) -> str:
    """Names the first few of many, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_keys(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises CheckpointError unless names and shapes agree exactly."""
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    if missing or unknown:
        parts = [f"{len(missing)} tensors are missing ({listing(missing)})"] if missing else []
        parts += [f"{len(unknown)} are unknown ({listing(unknown)})"] if unknown else []
        raise CheckpointError(f"{where} does not fit this network: {'; '.join(parts)}")
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            raise CheckpointError(f"{where} does not fit this network: {name} is {tuple(found[name])}, wanted {tuple(shape)}")


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raises CheckpointError for a dtype that is no weight's: whole numbers and FP8 need scales, which are not read."""
    if tensor.dtype not in FLOATS:
        raise CheckpointError(f"{name} is in {tensor.dtype}; save it in float16, bfloat16 or float32")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises CheckpointError for NaN, infinity, or a dtype that is no weight's."""
    check_dtype(name, tensor)
    extremes = torch.stack(torch.aminmax(tensor))  # passes NaN on; one quick reading where isfinite takes several
    if not torch.isfinite(extremes).all():
        raise CheckpointError(f"{name} holds NaN or infinite values in {tensor.dtype}; every weight must be finite")


def load(
    module: nn.Module,
    source: str | Path | Mapping[str, Any],
    prefix: str = "",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Fills every parameter of a UNet, Vae, TextTower or one of their blocks, one at a time.

    `source` is a path (a converted folder or a safetensors file), or a mapping of official names to tensors or arrays; only
    names under `prefix` count. The module may lie on the meta device. `device` and `dtype` default to the module's own, the
    CPU for one without data. Convolutions are held channels-last. Returns the official names that the module does not need.
    Raises CheckpointError for a missing, unknown, misshapen or non-finite tensor, and for integers and FP8, whose scales are
    not read.
    """
    tensors = source if isinstance(source, Mapping) else Weights(source)
    where = f"the mapping under {prefix!r}" if isinstance(source, Mapping) else str(source)
    unused = check(module, tensors, prefix, where)
    wanted = module_shapes(module)
    for name, parameter in list(module.named_parameters()):
        shapes = [wanted[official] for official in official_names(name)]
        _place(module, name, parameter, _parts(tensors, prefix, name, shapes, where), device, dtype)
    return unused


def check(module: nn.Module, tensors: Mapping[str, Any], prefix: str = "", where: str = "") -> list[str]:
    """Returns the official names that a module does not need; CheckpointError where one is missing or unknown."""
    where = where or f"the mapping under {prefix!r}"
    wanted = {prefix + name: shape for name, shape in module_shapes(module).items()}
    unneeded = tuple(prefix + name for name in getattr(module, "unused", ()))
    here = [name for name in tensors if name.startswith(prefix)]
    unused = [name for name in here if name not in wanted and name.startswith(unneeded or ("\0",))]
    unknown = [name for name in here if name not in wanted and name not in set(unused)]
    missing = [name for name in wanted if name not in set(here)]
    if missing or unknown:
        check_keys(dict.fromkeys([*wanted.keys() - set(missing), *unknown], ()), wanted, where)
    return unused


def _parts(tensors: Mapping[str, Any], prefix: str, name: str, shapes: list[tuple[int, ...]], where: str) -> list[Tensor]:
    """Reads the official tensors that make up our parameter `name` and holds them to their shapes."""
    officials = [prefix + official for official in official_names(name)]
    parts = [torch.as_tensor(tensors[official]) for official in officials]
    for official, part, shape in zip(officials, parts, shapes, strict=True):
        check_dtype(official, part)
        check_keys({official: tuple(part.shape)}, {official: shape}, where)
    return parts


def parameter(tensors: Mapping[str, Any], prefix: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Reads one parameter of ours in `dtype`, contiguous; `shape` may lack trailing ones. CheckpointError as in `load`."""
    stored = {prefix + official: torch.as_tensor(tensors[prefix + official]) for official in official_names(name)}
    for official, tensor in stored.items():
        check_dtype(official, tensor)
    officials = [tensor.to(dtype) for tensor in stored.values()]
    whole = torch.cat(officials) if len(officials) > 1 else officials[0]
    if (*shape, *[1] * (whole.dim() - len(shape))) != tuple(whole.shape):
        check_keys({name: tuple(whole.shape)}, {name: shape}, f"the mapping under {prefix!r}")
    check_finite(name, whole)
    return whole.reshape(shape).contiguous()


def memory_format(dims: int) -> torch.memory_format:
    """Returns the layout that parameters of so many dimensions are held in: convolutions' channels-last."""
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(dims, torch.contiguous_format)


def _place(
    module: nn.Module,
    name: str,
    old: nn.Parameter,
    parts: list[Tensor],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    where = torch.device("cpu") if device is None and old.is_meta else (device or old.device)
    new = torch.empty(old.shape, dtype=dtype or old.dtype, device=where, memory_format=memory_format(old.dim()))
    for piece, part in zip(new.chunk(len(parts)) if new.dim() else (new,), parts, strict=True):
        piece.copy_(part)
    check_finite(name, new)
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(new, requires_grad=old.requires_grad))


def text_hash(tensors: Mapping[str, Tensor], spec: TextSpec) -> str | None:
    """Names a text tower by the sha256 of its weights rounded to float16, however they are stored; None where it is absent."""
    with torch.device("meta"):
        names = [TEXT + name for name in sorted(module_shapes(TextTower(spec)))]
    if not all(name in tensors for name in names):
        return None
    digest = hashlib.sha256()
    for name in names:
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.to(torch.float16).contiguous().numpy().data)
    return digest.hexdigest()
