"""SQLite as a store of jobs: group fsync of commits, and a lock instead of SQLite's sleeping between writers."""

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# statements that begin a write transaction
WRITES = ("INSERT", "UPDATE", "DELETE", "REPLACE", "BEGIN")
# seconds after which a writer stops waiting for the lock and leaves the order to SQLite
LONGEST_TURN = 5.0
_turn = threading.Lock()


class Cursor(sqlite3.Cursor):
    """A cursor that takes the process's write lock at the first write of a transaction."""

    connection: "Connection"

    def execute(self, statement: str, *args: Any) -> "Cursor":
        with self.connection.turn(statement):
            super().execute(statement, *args)
        return self

    def executemany(self, statement: str, *args: Any) -> "Cursor":
        with self.connection.turn(statement):
            super().executemany(statement, *args)
        return self


class Connection(sqlite3.Connection):
    """A connection whose commits survive a crash of the process, and a power cut after `Disk.sync`.

    In WAL mode a commit appends to a log. An fsync in each commit would hold SQLite's write lock, and waiting writers would
    sleep for up to 100 ms at a time. So the fsync happens outside the transaction, and writers wait on a lock of their own.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._has_turn = False
        self.execute("PRAGMA synchronous=NORMAL")

    def cursor(self, factory: Any = Cursor) -> Any:
        return super().cursor(factory)

    @contextmanager
    def turn(self, statement: str) -> Iterator[None]:
        """Takes the write lock before a statement that writes, and keeps it until the transaction ends."""
        if not self._has_turn and statement.lstrip()[:8].upper().startswith(WRITES):
            self._has_turn = _turn.acquire(timeout=LONGEST_TURN)
        try:
            yield
        finally:
            if not self.in_transaction:
                self._end_turn()

    def _end_turn(self) -> None:
        if self._has_turn:
            self._has_turn = False
            _turn.release()

    def commit(self) -> None:
        try:
            super().commit()
        finally:
            if not self.in_transaction:
                self._end_turn()

    def rollback(self) -> None:
        try:
            super().rollback()
        finally:
            self._end_turn()

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._end_turn()


class DiskError(OSError):
    """A commit may not be on the disk."""


def prepare(path: Path) -> None:
    """Checks the database and sets WAL mode, which is permanent: writers then do not block readers."""
    connection = sqlite3.connect(path)
    try:
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise sqlite3.OperationalError(
                f"its disk keeps no write-ahead log (got {mode}), as network disks do not; use a local one"
            )
        said = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    finally:
        connection.close()
    if said != "ok":
        raise sqlite3.DatabaseError(said)


class Disk:
    """Syncs the database's log to the disk; concurrent callers share one fsync."""

    def __init__(self, path: Path, fsync: Callable[[int], None] = os.fsync):
        self.log = path.with_name(path.name + "-wal")
        self.folder = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
        self._fsync, self._turn = fsync, asyncio.Lock()
        self._begun = self._done = 0

    async def sync(self) -> None:
        """Returns once every earlier commit is on the disk; DiskError if the fsync fails."""
        wanted = self._begun + 1  # an fsync that has begun may have missed this commit
        async with self._turn:
            if self._done >= wanted:
                return
            self._begun += 1
            begun = self._begun
            await asyncio.to_thread(self._flush)
            self._done = begun

    def _flush(self) -> None:
        # a checkpoint that emptied the log has synced its content into the database
        try:
            descriptor = os.open(self.log, os.O_RDWR)
            try:
                self._fsync(descriptor)
            finally:
                os.close(descriptor)
            self._fsync(self.folder)
        except OSError as error:
            raise DiskError(error.errno, error.strerror) from error

    def close(self) -> None:
        os.close(self.folder)
