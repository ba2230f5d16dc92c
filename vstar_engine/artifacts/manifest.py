"""Manifests: what a folder holds, by size and sha256, and readers that refuse what does not agree."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vstar_engine.errors import CheckpointError, VstarError

from .file_kind import SAFETENSORS, weight_kind
from .files import digest_of, sha256

MANIFEST = "manifest.json"


WEIGHTS = "vstar-engine weights"


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
        raise CheckpointError(
            f"no weights at {path}; give a folder made by `vstar-engine convert`, a checkpoint, a diffusers folder "
            "or a model's id on the Hub, owner/name"
        )
    open_tensors(path, "np")
    return {}


def read_stated(path: Path) -> dict[str, Any]:
    """Returns what the manifest of a folder of weights states, its files unchecked; {} for anything else."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        return manifest if manifest["kind"] == WEIGHTS else {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def open_tensors(path: Path, framework: str) -> Any:
    """Opens a safetensors file, whose header must fit its length; CheckpointError for another."""
    if weight_kind(path, "weights") != SAFETENSORS:
        raise CheckpointError(f"{path} is in PyTorch's format, not safetensors; convert it first (`vstar-engine convert`)")
    try:
        return safe_open(path, framework)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error})") from error
