"""A finished video in the results folder: whole, synced to the disk and hashed, or not there at all."""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vstar_engine.artifacts.files import sha256, write_aside
from vstar_engine.errors import OutputError
from vstar_engine.video import Video, contact_sheet

from . import clock

log = logging.getLogger(__name__)

# what the file system says when there is no room
FULL = (errno.ENOSPC, errno.EDQUOT)
ROOM = 2**20
# where files go that the database does not know: it may be a new one, and they may be all that is left
UNKNOWN = "unknown"
JPEG_QUALITY = 85
# seconds after which no process writes on at what is half-written: a whole video takes one or two
ABANDONED = 3600.0


def names(id: str) -> tuple[str, str, str]:
    """Names a video's files: the video, its thumbnail, and its sheet of frames."""
    return f"{id}.mp4", f"{id}.jpg", f"{id}.sheet.jpg"


def owner_of(instance: str) -> str:
    """Returns the mark that a server's half-written files carry: others may write into the same folder."""
    return hashlib.sha256(instance.encode()).hexdigest()[:12]


def write(video: Video, folder: Path, id: str, owner: str) -> dict[str, Any]:
    """Writes a video's three files, the video last, and describes it as `events.Done` does; OutputError if it cannot."""
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
    """Writes a file that was made elsewhere; OutputError if it cannot."""
    with _synced(path, owner) as aside:
        aside.write_bytes(content)


def save_jpeg(picture: np.ndarray, target: Any, quality: int = JPEG_QUALITY) -> None:
    """Writes (H, W, 3) uint8 to a path or an open file."""
    from PIL import Image

    Image.fromarray(picture).save(target, "JPEG", quality=quality)


@contextmanager
def _synced(path: Path, owner: str) -> Iterator[Path]:
    """Yields a name beside `path`; the file there is on the disk before it takes its place, and so is its name after."""
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
    """Raises OSError unless a file holds so many frames: a muxer may close a file on a full disk without a word."""
    import av

    try:
        with av.open(str(path)) as container:
            found = sum(packet.size > 0 for packet in container.demux(video=0))
    except av.FFmpegError as error:
        raise OSError(errno.EIO, f"what was written is no video ({error.strerror})") from error
    if found != frames:
        raise OSError(errno.EIO, f"{found} of {frames} frames were written")


def is_full(error: BaseException | None, folder: Path) -> bool:
    """Returns whether a failure to write came from a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__
    # a muxer that could not close its file does not say why
    return shutil.disk_usage(folder).free < ROOM


def remove(folder: Path, id: str) -> None:
    """Removes a video's files, whichever are there."""
    for name in names(id):
        (folder / name).unlink(missing_ok=True)


def discard(folder: Path, id: str) -> None:
    """Removes what was written of a video that is none; where even that fails, the next try writes over it."""
    try:
        remove(folder, id)
    except OSError as error:
        log.warning("what was written of %s cannot be removed: %s", id, error)


def sweep(folder: Path, owner: str) -> None:
    """Removes what an owner left half-written, who is not writing now, and what of others nobody has touched for long."""
    old = clock.now() - ABANDONED
    for path in folder.glob(".*.partial.*"):
        with contextlib.suppress(FileNotFoundError):  # another server may sweep too
            if f".{owner}.partial." in path.name or path.stat().st_mtime < old:
                path.unlink()
