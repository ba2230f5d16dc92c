"""What is kept, and what goes: by age, by quota, and what failed jobs left. Files that no job knows are set aside."""

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
# younger files may belong to a job that is about to be recorded
ORPHAN_AGE = 600.0


def stored(folder: Path) -> int:
    """Counts the bytes of kept videos, of what lies beside them and of what was set aside."""
    return sum(entry.stat().st_size for entry in (*_files(folder), *_aside(folder)))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]


def _aside(folder: Path) -> list[Path]:
    """Returns the files that were set aside, the oldest first."""
    aside = folder / UNKNOWN
    return sorted(_files(aside), key=lambda path: path.stat().st_mtime) if aside.is_dir() else []


async def sweep(store: JobStore, settings: Settings, forget: Callable[[str], None]) -> int:
    """Deletes what is too old, too much or of no video, and tells `forget`; gives the number of videos deleted."""
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
        log.info("%d videos were deleted by age or quota", gone)
    return gone


async def delete(store: JobStore, folder: Path, ids: list[str]) -> int:
    """Deletes jobs and then their files: files without a job are set aside by a later sweep, a job without files never is."""
    await store.delete(ids)
    for id in ids:
        result_files.remove(folder, id)
    return len(ids)


async def _strays(store: JobStore, folder: Path) -> None:
    """Removes what jobs left that have no video, and sets aside old files of jobs that the database does not know."""
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
        log.info("what %d jobs without a video had left was removed", removed)
    if unknown:
        log.warning("%d files of jobs that the database does not know were moved to %s", unknown, folder / UNKNOWN)


def _set_aside(folder: Path, paths: list[Path]) -> int:
    for path in paths:
        (folder / UNKNOWN).mkdir(mode=PRIVATE, exist_ok=True)
        path.rename(folder / UNKNOWN / path.name)
    return len(paths)


def _clear_aside(settings: Settings) -> None:
    """Deletes what was set aside where it is older than videos are kept, or there is too much."""
    gone, left, end = 0, stored(settings.videos), clock.now() - (settings.keep_for or math.inf)
    for path in _aside(settings.videos):
        size = path.stat().st_size
        if path.stat().st_mtime < end or (settings.keep_bytes is not None and left > settings.keep_bytes):
            path.unlink()
            gone, left = gone + 1, left - size
    if gone:
        log.info("%d files that had been set aside were deleted by age or quota", gone)
