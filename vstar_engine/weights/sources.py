"""Where weights come from: a name becomes a folder that is loaded, by way of a download and one conversion where needed."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vstar_engine.artifacts.file_kind import SAFETENSORS, weight_kind
from vstar_engine.artifacts.files import digest_of, make_private, sha256
from vstar_engine.artifacts.manifest import MANIFEST, read_stated
from vstar_engine.config.model_sources import SOURCES, model_of_id
from vstar_engine.errors import DownloadError, OutputError

from . import converted, hub
from .bundled import BUNDLED
from .converted import STORED
from .diffusers_files import INDEX, is_layout, sha256_of, used_files
from .hub import HubId, Snapshot

HALVES = ("float16", "bfloat16")
GB = 1e9
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Offer:
    """A download that somebody may agree to: what it is, its bytes, the bytes it takes on disk, and the bytes that are free."""

    id: HubId
    commit: str
    licence: str
    download: int
    needed: int
    free: int

    def __str__(self) -> str:
        return (
            f"{self.id} (commit {self.commit}; licence: {self.licence}): {self.download / GB:.1f} GB to download; "
            f"{self.needed / GB:.1f} GB of disk needed with the conversion, {self.free / GB:.1f} GB free"
        )


Ask = Callable[[Offer], None]


def hub_id(weights: str | Path | None, model: str) -> HubId | None:
    """Returns the id that weights name, or that a model without weights is published under; None for a path."""
    if weights is None:
        return None if model in BUNDLED or model not in SOURCES else HubId.parse(str(SOURCES[model]))
    if os.path.exists(weights):  # an existing path wins over an id
        return None
    found = HubId.parse(str(weights))
    if found is not None and found.revision is None and found.file is None and (known := model_of_id(found.id)):
        return HubId.parse(str(SOURCES[known]))
    return found


def model_of(weights: str | Path | None) -> str | None:
    """Returns the model that weights are known to be of: by an id of the table, or as a diffusers folder; None for others."""
    if weights is None:
        return None
    if os.path.isdir(weights):
        return "modelscope" if (Path(weights) / INDEX).is_file() else None
    found = None if os.path.exists(weights) else HubId.parse(str(weights))
    return None if found is None else model_of_id(found.id)


def kept_dtypes(dtype: str) -> list[str]:
    """Returns the dtypes of conversions that serve a run in `dtype`: the first is made, each further one is taken if there."""
    return [dtype, STORED] if dtype in HALVES else [STORED, "float32", *HALVES]


def present(weights: str | Path | None, model: str, dtype: str) -> Path | None:
    """Returns the folder or file that is loaded, where it is on this machine already; None where it must be made first."""
    id = hub_id(weights, model)
    if id is None:
        path = Path(weights or "")
        if not _must_convert(path):
            return path
        source: object = _stamp(path)
    else:
        source = _hub_source(id)
    return next((folder for kept in kept_dtypes(dtype) if (folder := converted.found(source, model, kept))), None)


def obtain(
    weights: str | Path | None,
    model: str,
    kept: str = STORED,
    ask: Ask | None = None,
    on_progress: OnProgress | None = None,
    parts: Path | None = None,
) -> Path:
    """Downloads and converts what weights name, and returns the folder; `kept` is the dtype that it is stored in.

    `parts` is the folder of weights that a UNet alone takes its autoencoder and its text tower from.

    `ask` gets the offer before anything is downloaded, and raises to decline. Raises DownloadError, CheckpointError for what
    cannot be read, OutputError where the disk is too small; nothing half-written is left.
    """
    id = hub_id(weights, model)
    if id is None:
        path = Path(weights or "")
        return _converted(path, model, kept, {}, on_progress, parts) if _must_convert(path) else path
    snapshot = hub.look_up(id)
    names = snapshot.wanted(half=kept in HALVES)
    every = [*names, *_shards(snapshot, names)]
    size, download = sum(snapshot.sizes[name] for name in every), hub.missing_bytes(snapshot, every)
    rooms = [(hub.cache_folder(), download), (converted.cache_root(), size)]
    needed, free = _disk(rooms)
    known = SOURCES.get(model_of_id(id.id) or "")
    licence = (known.licence if known else None) or snapshot.licence or "its card names none"
    if ask is not None and download:
        ask(Offer(id, snapshot.commit, licence, download, needed, free))
    check_room(rooms)
    folder = hub.download(snapshot, names)
    source = folder / names[0] if len(names) == 1 else folder
    _check_sums(snapshot, every, folder)
    about = {"hub": {"id": id.id, "revision": id.revision, "commit": snapshot.commit, "file": id.file}}
    made = _converted(source, model, kept, about, on_progress, parts)
    # by the commit too, which a video's file names
    for name in (id, HubId(id.id, snapshot.commit, id.file)):
        converted.remember(_hub_source(name), model, kept, made)
    return made


def _shards(snapshot: Snapshot, names: Sequence[str]) -> list[str]:
    """Returns the files of a snapshot that indexes among `names` may name."""
    stems = [name.partition(".")[0] for name in names if ".index." in name]
    return [name for name in snapshot.sizes if "-of-" in name and name.startswith(tuple(stems) or "\0")]


def _hub_source(id: HubId) -> object:
    return ["hub", id.id, id.revision, id.file]


def _stamp(path: Path) -> object:
    """Names a file or a diffusers folder by the paths, sizes and times of what is read."""
    read = used_files(path) if path.is_dir() else [path]
    return ["path", [[str(one.absolute()), one.stat().st_size, one.stat().st_mtime_ns] for one in read]]


def _must_convert(path: Path) -> bool:
    """Returns whether a path is a checkpoint or a diffusers folder, which is converted before it is loaded."""
    if path.is_dir():
        return not (path / MANIFEST).is_file() and is_layout(path)
    return path.is_file() and weight_kind(path) != SAFETENSORS


def _converted(
    source: Path, model: str, kept: str, about: dict[str, Any], on_progress: OnProgress | None, parts: Path | None
) -> Path:
    """Returns the converted folder of a file or a diffusers folder: found by its stamp, by its sha256, or made."""
    stamp = _stamp(source)
    if parts is None and (folder := converted.found(stamp, model, kept)):
        return folder
    read = used_files(source) if source.is_dir() else [source]
    digest = sha256_of(source, read)
    if parts is not None:
        digest = digest_of([digest, read_stated(parts).get("sha256")])
        about = {**about, "parts": str(parts)}
    folder = converted.folder_of(model, kept, digest)
    if not converted.made_of(folder, digest):
        # imported here: what is on this machine already is found without PyTorch
        from .convert import convert

        check_room([(converted.cache_root(), sum(path.stat().st_size for path in read))])
        make_private(converted.cache_root())
        about = {**about, "sha256": digest}
        convert(source, folder, model, kept, force=True, on_progress=on_progress, about=about, parts=parts)
    converted.remember(stamp, model, kept, folder)
    return folder


def _check_sums(snapshot: Snapshot, names: Sequence[str], folder: Path) -> None:
    """Raises DownloadError for a file whose bytes are not those that the Hub states."""
    for name in names:
        if name in snapshot.sums and sha256(folder / name) != snapshot.sums[name]:
            raise DownloadError(
                f"{name} of {snapshot.id} is damaged: its sha256 is not the Hub's; remove {(folder / name).resolve()} "
                "and run it again"
            )


def _disk(rooms: Sequence[tuple[Path, int]]) -> tuple[int, int]:
    """Returns the bytes needed in all, and those free on the disk of the last folder."""
    return sum(size for _, size in rooms), shutil.disk_usage(_existing(rooms[-1][0])).free


def check_room(rooms: Sequence[tuple[Path, int]]) -> None:
    """Raises OutputError where a disk has less free than folders on it will take together."""
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in rooms:
        there = _existing(folder)
        first, before = disks.get(there.stat().st_dev, (there, 0))
        disks[there.stat().st_dev] = (first, before + size)
    for there, size in disks.values():
        if (free := shutil.disk_usage(there).free) < size:
            raise OutputError(
                f"{size / GB:.1f} GB are needed on the disk of {there}, which has {free / GB:.1f} GB free: make room, or set "
                f"HF_HOME (downloads) or {converted.ENVIRONMENT} (conversions) to another disk"
            )


def _existing(folder: Path) -> Path:
    """Returns a folder, or the nearest one above it that is there."""
    return folder if folder.is_dir() else _existing(folder.parent)
