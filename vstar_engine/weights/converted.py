"""The cache of converted weights: folders named by what they were made of, and found again without reading that.

<cache>/<model>-<dtype>-<hash>/manifest.json, model.safetensors, ...   <cache>/.found/<hash>.json: a source and its folder
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vstar_engine.artifacts.files import digest_of, make_private, user_cache, write_aside
from vstar_engine.artifacts.manifest import MANIFEST, read_stated
from vstar_engine.errors import CheckpointError, OutputError

ENVIRONMENT = "VSTAR_WEIGHTS_CACHE"
STORED = "stored"  # as a dtype: the one that the source has
FOUND = ".found"
HASH_LENGTH = 16


def cache_root() -> Path:
    """Returns the folder of converted weights: VSTAR_WEIGHTS_CACHE, else one in the user's cache."""
    if named := os.environ.get(ENVIRONMENT):
        return Path(named).absolute()
    if (cache := user_cache()) is None:
        raise CheckpointError(f"this user has no home directory to keep converted weights in; set {ENVIRONMENT} to a folder")
    return cache.absolute() / "vstar-engine" / "weights"


@dataclass(frozen=True)
class Entry:
    """A folder of the cache, and what its manifest states."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.manifest["files"])

    @property
    def origin(self) -> str:
        """Returns where its weights come from: an id of the Hub with its commit, or the name of a file or folder."""
        source = self.manifest["source"]
        hub = source.get("hub")
        return f"{hub['id']}@{hub['commit']}{':' + hub['file'] if hub['file'] else ''}" if hub else source["name"]


def entries() -> Iterator[Entry]:
    """Yields every folder of the cache by name; their files are not checked."""
    root = cache_root()
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if not folder.name.startswith(".") and (manifest := read_stated(folder)):
            yield Entry(folder, manifest)


def folder_of(model: str, dtype: str, sha256: str) -> Path:
    """Returns the folder that a source of a sha256 has, or will have."""
    return cache_root() / f"{model}-{dtype}-{sha256[:HASH_LENGTH]}"


def made_of(folder: Path, sha256: str) -> bool:
    """Returns whether a folder is there and was made of a source of that sha256."""
    return read_stated(folder).get("source", {}).get("sha256") == sha256


def found(source: object, model: str, dtype: str) -> Path | None:
    """Returns the folder that was made of a source, plain data that names it; None where there is none any more."""
    try:
        told = json.loads(_record(source, model, dtype).read_text())
        folder = cache_root() / told["folder"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return folder if made_of(folder, told.get("sha256")) else None


def remember(source: object, model: str, dtype: str, folder: Path) -> None:
    """Records that a folder was made of a source."""
    record = _record(source, model, dtype)
    make_private(record.parent)
    told = {"source": source, "folder": folder.name, "sha256": read_stated(folder)["source"]["sha256"]}
    with write_aside(record) as aside:
        aside.write_text(json.dumps(told))


def _record(source: object, model: str, dtype: str) -> Path:
    return cache_root() / FOUND / f"{digest_of([source, model, dtype])}.json"


def remove(name: str) -> Path:
    """Removes a folder of the cache by its name; CheckpointError for anything else, which stays."""
    folder = cache_root() / name
    if Path(name).name != name or name.startswith(".") or not (folder / MANIFEST).is_file() or not read_stated(folder):
        raise CheckpointError(f"there are no converted weights {name} in {cache_root()}; `vstar-engine weights` lists them")
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise OutputError(f"cannot remove {folder}: {error.strerror or error}") from error
    return folder
