"""Seeded stand-ins for trained weights: a whole checkpoint in the official format, streamed to disk.

`python -m vstar_engine.weights.random_checkpoint videocrafter2 model.ckpt` writes one of full size (about 4 GB in float16).
"""

import math
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vstar_engine.artifacts.files import write_aside
from vstar_engine.config import models
from vstar_engine.config.models import Spec
from vstar_engine.sampling import schedule

from .key_map import official_shapes
from .streaming_keys import published_shapes

PIECE_BYTES = 2**22


def tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Draws one weight in float32: matrices and convolutions keep their input's scale, norms are near one, biases small."""
    if not shape:
        return torch.tensor(math.log(1 / 0.07), dtype=torch.float32)  # logit_scale
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    values = torch.randn(shape, generator=generator, dtype=torch.float32)
    if len(shape) > 1:
        return values / math.prod(shape[1:]) ** 0.5
    return 1.0 + 0.1 * values if name.endswith("weight") else 0.02 * values


def write(spec: Spec, path: Path, seed: int = 0, dtype: torch.dtype = torch.float16) -> None:
    """Writes {"state_dict": ...} with every official tensor, never holding more than one of them."""
    shapes = official_shapes(spec) if spec.streaming is None else published_shapes(spec)
    buffers = schedule.buffers()
    with FakeTensorMode():
        empty = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    with write_aside(path) as aside:
        # through an open file, since a file's name would become part of its content
        with torch.serialization.skip_data(materialize_fake_tensors=True), aside.open("wb") as file:
            torch.save({"state_dict": empty}, file)
        with FakeTensorMode():
            written = torch.load(aside, weights_only=True)["state_dict"]
        with aside.open("r+b") as holes:
            for name, shape in shapes.items():
                values = torch.from_numpy(buffers[name]) if name in buffers else tensor(name, shape, seed)
                holes.seek(written[name].untyped_storage()._checkpoint_offset)
                holes.write(values.to(dtype).numpy().tobytes())
        _restate_sums(aside)


def _restate_sums(path: Path) -> None:
    """Writes into an archive the CRC-32 that each entry has now, in both places that state it."""
    with zipfile.ZipFile(path) as archive:
        entries, position = archive.infolist(), archive.start_dir
    with path.open("r+b") as file:
        for entry in entries:
            file.seek(entry.header_offset)
            flags, name, extra = struct.unpack("<6xH18xHH", file.read(30))
            file.seek(name + extra, 1)
            left, total = entry.file_size, 0
            while left:
                piece = file.read(min(left, PIECE_BYTES))
                left, total = left - len(piece), zlib.crc32(piece, total)
            stated = struct.pack("<I", total)
            # flag 8: the sum stands behind the data and a signature, not in the header before them
            file.seek(4, 1) if flags & 8 else file.seek(entry.header_offset + 14)
            file.write(stated)
            file.seek(position)
            name, extra, comment = struct.unpack("<28xHHH12x", file.read(46))
            file.seek(position + 16)
            file.write(stated)
            position += 46 + name + extra + comment


def main() -> None:
    if len(sys.argv) not in (3, 4) or sys.argv[1] not in models.MODELS:
        sys.exit(f"usage: python -m vstar_engine.weights.random_checkpoint {{{','.join(models.MODELS)}}} FILE [SEED]")
    write(models.model_named(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) == 4 else 0)


if __name__ == "__main__":
    main()
