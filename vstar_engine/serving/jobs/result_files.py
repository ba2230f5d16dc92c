"""A video's files in the results folder: complete, synced and hashed, or absent."""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vstar_engine.artifacts.files import sha256, write_aside
from vstar_engine.errors import OutputError
from vstar_engine.video import Video, contact_sheet

from . import clock

log = logging.getLogger(__name__)

# errors of a full disk or quota
FULL = (errno.ENOSPC, errno.EDQUOT)
ROOM = 2**20
# folder for files that the database does not know; it may be a new database, and the files the only copies
UNKNOWN = "unknown"
JPEG_QUALITY = 85
# seconds after which a partial file is abandoned; writing a whole video takes one or two
ABANDONED = 3600.0


def names(id: str) -> tuple[str, str, str]:
    """Returns the names of a video's files: the video, the thumbnail, the contact sheet."""
    return f"{id}.mp4", f"{id}.jpg", f"{id}.sheet.jpg"


def owner_of(instance: str) -> str:
    """Returns the tag of a server's partial files, since several servers may share the folder."""
    return hashlib.sha256(instance.encode()).hexdigest()[:12]


def without_folders(provenance: dict[str, Any]) -> dict[str, Any]:
    """Returns what made a video without this machine's folders, which are nobody's business: names and hashes stay."""
    found = dict(provenance)
    if loras := provenance.get("loras"):
        found["loras"] = [{**one, "lora": Path(one["lora"]).name} for one in loras]
    if isinstance(held := provenance.get("embeddings"), str):
        found["embeddings"] = Path(held).name
    return found


def write(video: Video, folder: Path, id: str, owner: str) -> dict[str, Any]:
    """Writes a video's three files, the video last; returns the fields of `events.Done`. OutputError if a write fails."""
    video = replace(video, provenance=without_folders(video.provenance))
    file, thumbnail, sheet = (folder / name for name in names(id))
    for path, picture in ((thumbnail, video.frames[len(video.frames) // 2]), (sheet, contact_sheet(video.frames))):
        with _synced(path, owner) as aside:
            save_jpeg(picture, aside)
    with _synced(file, owner) as aside:
        video.save(aside)
        _check_whole(aside, len(video.frames))
        about = {"file": file.name, "bytes": aside.stat().st_size, "sha256": sha256(aside)}
    frames, height, width, _ = video.frames.shape
    return {**about, "frames": frames, "width": width, "height": height}


def keep(content: bytes, path: Path, owner: str) -> None:
    """Writes a file made on another machine; OutputError if that fails."""
    with _synced(path, owner) as aside:
        aside.write_bytes(content)


def save_jpeg(picture: np.ndarray, target: Any, quality: int = JPEG_QUALITY) -> None:
    """Writes a picture, (H, W, 3) uint8, as JPEG to a path or an open file."""
    from PIL import Image

    Image.fromarray(picture).save(target, "JPEG", quality=quality)


@contextmanager
def _synced(path: Path, owner: str) -> Iterator[Path]:
    """Yields a temporary path; syncs the file there, renames it to `path` and syncs the folder."""
    with write_aside(path, owner=owner) as aside:
        yield aside
        _sync(aside)
    try:
        _sync(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_whole(path: Path, frames: int) -> None:
    """Raises OSError unless a file holds this number of frames: on a full disk a muxer may close a file without an error."""
    import av

    try:
        with av.open(str(path)) as container:
            found = sum(packet.size > 0 for packet in container.demux(video=0))
    except av.FFmpegError as error:
        raise OSError(errno.EIO, f"the file that was written is not a video ({error.strerror})") from error
    if found != frames:
        raise OSError(errno.EIO, f"{found} of {frames} frames were written")


def is_full(error: BaseException | None, folder: Path) -> bool:
    """Returns whether a write failed because the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__
    # a muxer that could not close its file gives no errno
    return shutil.disk_usage(folder).free < ROOM


def remove(folder: Path, id: str) -> None:
    """Removes a video's files, if they exist."""
    for name in names(id):
        (folder / name).unlink(missing_ok=True)


def discard(folder: Path, id: str) -> None:
    """Removes the files of an incomplete video. A failure is logged; the next try overwrites them."""
    try:
        remove(folder, id)
    except OSError as error:
        log.warning("the files of %s cannot be removed: %s", id, error)


def sweep(folder: Path, owner: str) -> None:
    """Removes the partial files of an owner that is not writing now, and abandoned ones of others."""
    old = clock.now() - ABANDONED
    for path in folder.glob(".*.partial.*"):
        with contextlib.suppress(FileNotFoundError):  # another server may sweep at the same time
            if f".{owner}.partial." in path.name or path.stat().st_mtime < old:
                path.unlink()
