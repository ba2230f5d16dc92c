"""Files that must be whole or absent: writing aside, hashing, and manifests that refuse what they do not describe.

A built engine is such a folder: private, named by everything that shaped it, and refused where any of that differs.
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vstar_engine.kernels.sources import kernel_hash as kernel_hash

from .errors import CheckpointError, OutputError, VstarError

MANIFEST = "manifest.json"
WEIGHTS = "vstar-engine weights"
PRIVATE = 0o700


def check_writable(path: Path, force: bool = False, made: Sequence[str] | None = None) -> None:
    """Raises OutputError when `path` cannot be written, exists and `force` is off, or is a folder of what we do not make.

    A file replaces no folder; a folder replaces one that holds nothing but names which match the patterns `made`.
    """
    if made is None and path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; give the name of a file")
    if path.exists() and not force:
        raise OutputError(f"{path} exists; give --force to replace it, or another name")
    if made is not None and path.is_symlink():
        raise OutputError(f"{path} is a link to {path.resolve()}; give that folder as --out, or another name")
    if made is not None and path.is_dir():
        for entry in path.iterdir():
            if not any(entry.match(pattern) for pattern in made):
                raise OutputError(f"{path} holds {entry.name}, which is not ours; it is left as it is, so give another name")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {path}: the folder {folder} is not writable")


@contextmanager
def write_aside(path: Path, folder: bool = False, private: bool = False, owner: str | None = None) -> Iterator[Path]:
    """Yields a temporary file name (or a new folder) beside `path` that takes its place on success and vanishes otherwise.

    The name says whose it is: `owner`'s, else this process's.
    """
    aside = path.absolute().parent / f".{path.name}.{owner or os.getpid()}.partial{path.suffix}"
    try:
        if folder:
            aside.mkdir(mode=PRIVATE if private else 0o777)
        yield aside
        _take_place(aside, path)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)


def _take_place(aside: Path, path: Path) -> None:
    """Renames `aside` to `path`; a folder that is there already and the new one change places, so that one always is."""
    if not (path.is_dir() and aside.is_dir()):
        os.replace(aside, path)
        return
    if _exchanged(aside, path):
        return  # the old one is aside now, and goes as what failed would
    before = path.absolute().parent / f".{path.name}.{os.getpid()}.before"
    os.replace(path, before)
    try:
        os.replace(aside, path)
    except OSError:
        os.replace(before, path)
        raise
    shutil.rmtree(before)


def _exchanged(one: Path, other: Path) -> bool:
    """Lets two names change places at once; False where the system or the disk cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename is None or rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return rename is not None
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number))


def clear_killed(path: Path) -> None:
    """Removes what killed writers of `path` left beside it; one must be kept away meanwhile.

    A folder that was moved away, on a disk where names cannot change places, comes back where nothing took its place.
    """
    path = path.absolute()
    ours = re.compile(rf"\.{re.escape(path.name)}\.\d+\.(before|partial{re.escape(path.suffix)})")
    for left in [entry for entry in path.parent.iterdir() if ours.fullmatch(entry.name)]:
        if left.suffix == ".before" and not path.exists():
            os.replace(left, path)
        else:
            shutil.rmtree(left)


def make_private(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, for this user alone."""
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=PRIVATE, exist_ok=True)


def sha256(path: Path) -> str:
    """Hashes a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(content: object) -> str:
    """Hashes plain data by its JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes `content`, every file of the folder with its size and sha256, and a sha256 over all that, to the manifest."""
    listed = [{"name": p.name, "bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(folder.iterdir())]
    whole = json.loads(json.dumps({**content, "files": listed}))
    (folder / MANIFEST).write_text(json.dumps({**whole, "sha256": digest_of(whole)}, indent=1) + "\n")


def read_manifest(
    folder: Path, kind: str, error: type[VstarError] = CheckpointError, maker: str = "vstar-engine convert"
) -> dict[str, Any]:
    """Reads a manifest of the given kind and checks every file it names; an `error` says what does not agree."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as missing:
        raise error(f"{folder} holds no {MANIFEST}; make such a folder with `{maker}`") from missing
    except OSError as unread:
        raise error(f"{folder / MANIFEST} cannot be read: {unread.strerror}") from unread
    except (ValueError, RecursionError) as broken:
        raise error(f"{folder / MANIFEST} is not JSON ({broken})") from broken
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        raise error(f"{folder / MANIFEST} does not describe {kind}")
    # folders of earlier versions carry no sha256 over the manifest itself
    if "sha256" in manifest and manifest["sha256"] != digest_of({k: v for k, v in manifest.items() if k != "sha256"}):
        raise error(f"{folder / MANIFEST} was altered: its content does not have the sha256 that it states")
    entries = manifest.get("files")
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and {"name", "bytes", "sha256"} <= e.keys() and _is_name(e["name"]) for e in entries
    ):
        raise error(f"{folder / MANIFEST} lists no files with their sizes and sha256")
    for entry in entries:
        path = folder / Path(entry["name"]).name
        if not path.is_file():
            raise error(f"{path} is missing, though {MANIFEST} lists it")
        if path.stat().st_size != entry["bytes"]:
            raise error(f"{path} has {path.stat().st_size} bytes where {MANIFEST} says {entry['bytes']}")
        if sha256(path) != entry["sha256"]:
            raise error(f"{path} was altered: its sha256 is not the one in {MANIFEST}")
    return manifest


def _is_name(name: object) -> bool:
    return isinstance(name, str) and "\0" not in name


def read_weights(path: Path) -> dict[str, Any]:
    """Reads the manifest of a folder of weights, its files checked; {} for one safetensors file. CheckpointError for else."""
    if path.is_dir():
        return read_manifest(path, WEIGHTS)
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}; give a folder made by `vstar-engine convert`")
    open_tensors(path, "np")
    return {}


def open_tensors(path: Path, framework: str) -> Any:
    """Opens a safetensors file, whose header must fit its length; CheckpointError for another."""
    try:
        return safe_open(path, framework)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error})") from error
