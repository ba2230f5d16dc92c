"""Files that must be whole or absent: writing aside, hashing, and manifests that refuse what they do not describe."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CheckpointError, OutputError

MANIFEST = "manifest.json"


def check_writable(path: Path, force: bool = False) -> None:
    """Raises OutputError when `path` cannot be written, or exists and `force` is off."""
    if path.exists() and not force:
        raise OutputError(f"{path} exists; give --force to replace it, or another name")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {path}: the folder {folder} is not writable")


@contextmanager
def write_aside(path: Path, folder: bool = False) -> Iterator[Path]:
    """Yields a temporary file name (or a new folder) beside `path` that takes its place on success and vanishes otherwise."""
    aside = path.absolute().parent / f".{path.name}.{os.getpid()}.partial{path.suffix}"
    try:
        if folder:
            aside.mkdir()
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
    """Renames `aside` to `path`; a folder that is there already is kept until the new one has its place."""
    if not path.is_dir():
        os.replace(aside, path)
        return
    before = path.absolute().parent / f".{path.name}.{os.getpid()}.before"
    os.replace(path, before)
    try:
        os.replace(aside, path)
    except OSError:
        os.replace(before, path)
        raise
    shutil.rmtree(before)


def sha256(path: Path) -> str:
    """Hashes a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes `content` and every file of the folder with its size and sha256 to the folder's manifest."""
    files = [{"name": p.name, "bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(folder.iterdir())]
    (folder / MANIFEST).write_text(json.dumps({**content, "files": files}, indent=1) + "\n")


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Reads a manifest of the given kind and checks every file it names; CheckpointError says what does not agree."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no {MANIFEST}; make such a folder with `vstar-engine convert`") from error
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST} is not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        raise CheckpointError(f"{folder / MANIFEST} does not describe {kind}")
    for entry in manifest["files"]:
        path = folder / entry["name"]
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though {MANIFEST} lists it")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes where {MANIFEST} says {entry['bytes']}")
        if sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} was altered: its sha256 is not the one in {MANIFEST}")
    return manifest
