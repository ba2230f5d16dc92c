"""Pickles of tensors, read without running any code from them and held to the sums that their archive states."""

import pathlib
import pickle
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vstar_engine.errors import CheckpointError

PIECE_BYTES = 2**22
# the function that numpy's scalars are unpickled by
SCALAR = np.float64(0).__reduce__()[0]
# what Lightning keeps beside the weights and what runs no code: numbers of numpy, and paths
HARMLESS: list[Any] = [
    np.dtype,
    *(kind for kind in vars(np.dtypes).values() if isinstance(kind, type)),
    *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(
        (pathlib.PurePath, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    ),
]


def read_pickle(source: Path) -> Any:
    """Reads what a pickle of tensors holds without running any code from it; CheckpointError says why it cannot be.

    Of an archive too large to be mapped whole, tensors have no data; `Streamed` reads them.
    """
    archived = zipfile.is_zipfile(source)
    if archived:
        check_sums(source)
    try:
        with torch.serialization.safe_globals(HARMLESS), _named_as_a_pickle(source) as named:
            return _load(named, archived)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise CheckpointError(
            f"{source} holds something other than tensors, which is never executed ({reason}); save only its state_dict"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{source} is damaged or cut short ({said}); download it again") from error


def _load(source: Path, archived: bool) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=archived)
    except RuntimeError as error:
        # PyTorch maps a file writable, which a system without so much memory may refuse
        if not archived or "unable to mmap" not in str(error):
            raise
        with FakeTensorMode():
            return torch.load(source, weights_only=True)


class Streamed(Mapping[str, Tensor]):
    """The tensors of an archive that were read without data, each mapped when it is asked for."""

    def __init__(self, source: Path, tensors: Mapping[str, Tensor]):
        self.source, self.tensors = source, tensors

    def __getitem__(self, name: str) -> Tensor:
        without: Any = self.tensors[name]
        storage = without.untyped_storage()
        stored = np.memmap(self.source, np.uint8, "c", storage._checkpoint_offset, (storage.nbytes(),))
        whole = torch.from_numpy(stored).view(without.dtype)
        return whole.as_strided(without.shape, without.stride(), without.storage_offset())

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@contextmanager
def _named_as_a_pickle(source: Path) -> Iterator[Path]:
    """Yields a name of the file that does not end in .safetensors, by which `torch.load` chooses another reader."""
    if source.suffix != ".safetensors":
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "checkpoint.pt"
        link.symlink_to(source.absolute())
        yield link


def check_sums(source: Path) -> None:
    """Raises CheckpointError for an archive's entry whose bytes do not have the CRC-32 that the archive states.

    A stated sum of 0 means none: PyTorch can be told to compute no sums.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            for entry in archive.infolist():
                # zipfile would compare, and take 0 for a sum
                stated, entry.CRC = entry.CRC, None  # type: ignore[assignment]
                total = 0
                with archive.open(entry) as file:
                    while piece := file.read(PIECE_BYTES):
                        total = zlib.crc32(piece, total)
                if stated and total != stated:
                    raise CheckpointError(
                        f"{source} is damaged: the bytes of {entry.filename} do not have the CRC-32 that the archive states "
                        f"({total:08x}, not {stated:08x}); download it again"
                    )
    except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(f"{source} is damaged or cut short ({error}); download it again") from error
