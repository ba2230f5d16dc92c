"""Files that must be whole or absent: writing aside, hashing, and manifests that refuse what they do not describe.

A built engine is such a folder: private, named by everything that shaped it, and refused where any of that differs.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import CheckpointError, OutputError, VstarError

MANIFEST = "manifest.json"
WEIGHTS = "vstar-engine weights"
PRIVATE = 0o700


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


def kernel_hash() -> str:
    """Names the temporal attention by the sha256 of the sources that define it and every way it runs on a GPU."""
    digest = hashlib.sha256()
    sources = {path.name: path.read_bytes() for path in files("vstar_engine.kernels").iterdir() if path.name.endswith(".py")}
    for name in sorted(sources):
        digest.update(name.encode())
        digest.update(sources[name])
    return digest.hexdigest()


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
