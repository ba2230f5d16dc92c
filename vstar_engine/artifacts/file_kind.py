"""What a weight file is, by its bytes; a file's ending is not asked."""

import zipfile
from pathlib import Path

from vstar_engine.errors import CheckpointError

SAFETENSORS, ARCHIVE, PICKLE = "a safetensors file", "PyTorch's archive", "a pickle"
HEAD_BYTES = 4096
SHOWN_LETTERS = 100
# what files begin with that are no weights, and what would do
OTHER_FORMATS = {
    b"\x1f\x8b": "is a gzip archive; unpack it first",
    b"BZh": "is a bzip2 archive; unpack it first",
    b"\xfd7zXZ\0": "is an xz archive; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "is a 7-Zip archive; unpack it first",
    b"Rar!": "is a rar archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "is a Zstandard archive; unpack it first",
    b"\x93NUMPY": "is a NumPy array (.npy), not named tensors",
    b"GGUF": "is a GGUF file, whose quantised weights are not read; give the unquantised checkpoint",
    b"\x89HDF": "is an HDF5 file; save its tensors as safetensors",
    b"%PDF": "is a PDF, not a checkpoint",
    b"\x89PNG": "is a picture, not a checkpoint",
    b"\xff\xd8\xff": "is a picture, not a checkpoint",
}
WEIGHT_ENDINGS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


def weight_kind(path: Path, what: str = "checkpoint") -> str:
    """Returns SAFETENSORS, ARCHIVE or PICKLE; CheckpointError says what another file is."""
    if not path.is_file():
        raise CheckpointError(f"no {what} at {path}")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"{path} is empty; download it again")
    if not any(head):
        raise CheckpointError(f"{path} begins with empty space: its download has not finished, so download it again")
    for start, said in OTHER_FORMATS.items():
        if head.startswith(start):
            raise CheckpointError(f"{path} {said}")
    if head[257:262] == b"ustar":
        raise CheckpointError(f"{path} is a tar archive; unpack it first")
    if head.startswith(b"PK"):
        return _archive(path)
    # the length of a JSON header, then the header
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return SAFETENSORS
    if head.startswith(b"\x80"):
        return PICKLE
    _refuse_text(path, head, what)
    raise CheckpointError(f"{path} is no {what}: it begins with the bytes {head[:8].hex(' ')}; download it again")


def _archive(path: Path) -> str:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is cut short; download it again")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise CheckpointError(
            f"{path} is a TorchScript program, which is never executed; give its state dict, saved by torch.save"
        )
    if "data.pkl" in inner:
        return ARCHIVE
    held = [name for name in names if name.lower().endswith(WEIGHT_ENDINGS)]
    if held:
        raise CheckpointError(f"{path} is a zip archive with {held[0]} in it; unpack it first and give that file")
    first = f" ({names[0]} ...)" if names else ""
    raise CheckpointError(f"{path} is a zip archive of something else{first}, not PyTorch's; no tensors are in it")


def _refuse_text(path: Path, head: bytes, what: str) -> None:
    """Raises CheckpointError for a page, a pointer or an answer that was saved in a file's place."""
    try:
        # a letter may be cut at the end of what was read
        text = head.decode("utf-8-sig") if len(head) < HEAD_BYTES else head[:-3].decode("utf-8-sig", "ignore")
    except UnicodeDecodeError:
        return
    if any(not letter.isprintable() and not letter.isspace() for letter in text):
        return
    start = text.strip()
    if start.lower().startswith(("<!doctype", "<html", "<head")):
        raise CheckpointError(f"{path} is a web page, not the {what}; download the file itself")
    if start.startswith("version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the {what}; fetch the file itself")
    if '"weight_map"' in start:
        raise CheckpointError(
            f"{path} is the index of the {what} in several files, which are not read together; join them in one"
        )
    shown = " ".join(start.split())
    shown = shown if len(shown) <= SHOWN_LETTERS else shown[:SHOWN_LETTERS] + "..."
    raise CheckpointError(
        f"{path} is text such as a server's answer, not the {what}: {shown!r}; download it again, with a login if it needs one"
    )
