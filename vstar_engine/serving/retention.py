"""What is kept, and what goes: by age, by quota, and files that no job knows."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from . import results
from .job import ID
from .settings import Settings
from .store import JobStore

log = logging.getLogger(__name__)

EVERY = 60.0
BATCH = 100
# younger files may belong to a job that is about to be recorded
ORPHAN_AGE = 600.0


def stored(folder: Path) -> int:
    """Counts the bytes of kept videos and what lies beside them."""
    return sum(entry.stat().st_size for entry in _files(folder))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]


async def sweep(store: JobStore, settings: Settings, forget: Callable[[str], None]) -> int:
    """Deletes what is too old, too much or unknown, and tells `forget`; gives the number of videos deleted."""
    gone = 0

    async def drop(ids: list[str]) -> int:
        for id in ids:
            forget(id)
        return await delete(store, settings.videos, ids)

    if settings.keep_for is not None:
        while ids := await store.ended(time.time() - settings.keep_for, BATCH):
            gone += await drop(ids)
    if settings.keep_bytes is not None:
        while stored(settings.videos) > settings.keep_bytes and (ids := await store.ended(limit=1)):
            gone += await drop(ids)
    await _orphans(store, settings.videos)
    if gone:
        log.info("%d videos were deleted by age or quota", gone)
    return gone


async def delete(store: JobStore, folder: Path, ids: list[str]) -> int:
    """Deletes jobs and then their files: files without a job are found by the next sweep, a job without files never is."""
    await store.delete(ids)
    for id in ids:
        results.remove(folder, id)
    return len(ids)


async def _orphans(store: JobStore, folder: Path) -> None:
    old = time.time() - ORPHAN_AGE
    named: dict[str, None] = {}
    for path in _files(folder):
        if ID.fullmatch(id := path.name.partition(".")[0]) and path.stat().st_mtime < old:
            named[id] = None
    ids = list(named)
    for start in range(0, len(ids), BATCH):
        some = ids[start : start + BATCH]
        for id in set(some) - await store.known(some):
            results.remove(folder, id)
