"""A weight file is told by its bytes, and what a download leaves in its place is named."""

import gzip
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vstar_engine.artifacts.file_kind import ARCHIVE, PICKLE, SAFETENSORS, weight_kind
from vstar_engine.artifacts.manifest import read_weights
from vstar_engine.errors import CheckpointError


def test_the_ending_is_not_asked(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "a.ckpt")
    torch.save({"w": torch.ones(3)}, tmp_path / "b.safetensors")
    torch.save({"w": torch.ones(3)}, tmp_path / "c", _use_new_zipfile_serialization=False)
    assert [weight_kind(tmp_path / name) for name in ("a.ckpt", "b.safetensors", "c")] == [SAFETENSORS, ARCHIVE, PICKLE]
    assert read_weights(tmp_path / "a.ckpt") == {}
    with pytest.raises(CheckpointError, match="is in PyTorch's format, not safetensors; convert it first"):
        read_weights(tmp_path / "b.safetensors")


def zipped(path, name):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"bytes")


FILES = {
    "an answer": (lambda path: path.write_text("Entry not found"), "is text such as a server's answer, .*'Entry not found'"),
    "JSON": (lambda path: path.write_text('{"error": "log in"}'), "is text such as a server's answer.*log in"),
    "long text": (lambda path: path.write_text("ü" * 9000), "is text such as"),
    "a page": (lambda path: path.write_text("\ufeff\n<!DOCTYPE html><html>"), "is a web page, not the checkpoint"),
    "an index": (lambda path: path.write_text('{"weight_map": {}}'), "is the index of the checkpoint in several files"),
    "preallocated": (lambda path: path.write_bytes(bytes(65536)), "begins with empty space: its download has not finished"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x")), "is a gzip archive; unpack it first"),
    "npy": (lambda path: np.save(path.open("wb"), np.ones(3)), r"is a NumPy array \(.npy\)"),
    "npz": (lambda path: np.savez(path.open("wb"), a=np.ones(3)), r"is a zip archive of something else \(a.npy ...\)"),
    "a zipped folder": (
        lambda path: zipped(path, "VideoCrafter2/model.ckpt"),
        "with VideoCrafter2/model.ckpt in it; unpack it",
    ),
    "a program": (lambda path: zipped(path, "m/constants.pkl"), "is a TorchScript program, which is never executed"),
    "a cut archive": (lambda path: path.write_bytes(b"PK\3\4" + bytes(90)), "is cut short"),
    "a program's bytes": (lambda path: path.write_bytes(b"\x7fELF\1\0"), "it begins with the bytes 7f 45 4c 46"),
}


@pytest.mark.parametrize("case", FILES)
def test_what_is_no_weight_file_is_named(case, tmp_path):
    write, said = FILES[case]
    write(tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=said):
        weight_kind(tmp_path / "model.ckpt")
