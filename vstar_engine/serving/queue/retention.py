"""Deletes videos by age and quota, and the files of failed jobs; moves files without a job aside."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

from vstar_engine.artifacts.files import PRIVATE
from vstar_engine.serving.jobs import clock, result_files
from vstar_engine.serving.jobs.job import ID
from vstar_engine.serving.jobs.result_files import UNKNOWN
from vstar_engine.serving.settings import Settings

from .store import JobStore

log = logging.getLogger(__name__)

BATCH = 100
# seconds; a younger file may belong to a job that is not recorded yet
ORPHAN_AGE = 600.0


def stored(folder: Path) -> int:
    """Returns the bytes of all results, with thumbnails, contact sheets and files set aside."""
    return sum(entry.stat().st_size for entry in (*_files(folder), *_aside(folder)))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]


def _aside(folder: Path) -> list[Path]:
    """Returns the files set aside, the oldest first."""
    aside = folder / UNKNOWN
    return sorted(_files(aside), key=lambda path: path.stat().st_mtime) if aside.is_dir() else []


async def sweep(store: JobStore, settings: Settings, forget: Callable[[str], None]) -> int:
    """Deletes what exceeds age or quota and what has no video; calls `forget(id)` for each deleted video.

    Returns the number of videos deleted.
    """
    gone = 0

    async def drop(ids: list[str]) -> int:
        for id in ids:
            forget(id)
        return await delete(store, settings.videos, ids)

    await _strays(store, settings.videos)
    _clear_aside(settings)
    if settings.keep_for is not None:
        while ids := await store.ended(clock.now() - settings.keep_for, BATCH):
            gone += await drop(ids)
    if settings.keep_bytes is not None:
        while stored(settings.videos) > settings.keep_bytes and (ids := await store.ended(limit=1)):
            gone += await drop(ids)
    if gone:
        log.info("deleted %d videos by age or quota", gone)
    return gone


async def delete(store: JobStore, folder: Path, ids: list[str]) -> int:
    """Deletes jobs, then their files: a later sweep finds files without a job, but nothing would find a job without files."""
    await store.delete(ids)
    for id in ids:
        result_files.remove(folder, id)
    return len(ids)


async def _strays(store: JobStore, folder: Path) -> None:
    """Removes the files of jobs without a video; moves old files of jobs that the database does not know aside."""
    old = clock.now() - ORPHAN_AGE
    found: dict[str, list[Path]] = {}
    for path in _files(folder):
        if ID.fullmatch(id := path.name.partition(".")[0]):
            found.setdefault(id, []).append(path)
    ids, removed, unknown = list(found), 0, 0
    for start in range(0, len(ids), BATCH):
        some = ids[start : start + BATCH]
        known = await store.known(some)
        for id in some:
            if id not in known:
                unknown += _set_aside(folder, [path for path in found[id] if path.stat().st_mtime < old])
            elif not known[id]:
                result_files.remove(folder, id)
                removed += 1
    if removed:
        log.info("removed the files of %d jobs without a video", removed)
    if unknown:
        log.warning("moved %d files of jobs that the database does not know to %s", unknown, folder / UNKNOWN)


def _set_aside(folder: Path, paths: list[Path]) -> int:
    for path in paths:
        (folder / UNKNOWN).mkdir(mode=PRIVATE, exist_ok=True)
        path.rename(folder / UNKNOWN / path.name)
    return len(paths)


def _clear_aside(settings: Settings) -> None:
    """Deletes files set aside that exceed age or quota."""
    gone, left, end = 0, stored(settings.videos), clock.now() - (settings.keep_for or math.inf)
    for path in _aside(settings.videos):
        size = path.stat().st_size
        if path.stat().st_mtime < end or (settings.keep_bytes is not None and left > settings.keep_bytes):
            path.unlink()
            gone, left = gone + 1, left - size
    if gone:
        log.info("deleted %d files set aside by age or quota", gone)
