"""SQLite as a store of jobs: commits that wait for the disk together, and writers that wait for each other without sleeping."""

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# what begins a transaction that writes
WRITES = ("INSERT", "UPDATE", "DELETE", "REPLACE", "BEGIN")
# seconds after which a writer leaves it to SQLite who is next
LONGEST_TURN = 5.0
_turn = threading.Lock()


class Cursor(sqlite3.Cursor):
    """A cursor whose first write of a transaction waits for this process's other writers."""

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
    """A connection whose commits survive the death of the process; a power cut they survive after `Disk.sync`.

    In WAL mode a commit is bytes at the end of a log. Waiting for the disk at each, with the lock on writing held, lets the
    others queue up behind it, and SQLite lets them sleep for up to 100 ms at a time: so writers take turns before they ask it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._has_turn = False
        self.execute("PRAGMA synchronous=NORMAL")

    def cursor(self, factory: Any = Cursor) -> Any:
        return super().cursor(factory)

    @contextmanager
    def turn(self, statement: str) -> Iterator[None]:
        """Waits for its turn where a statement begins to write, and keeps it for as long as the transaction lasts."""
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
    """What was committed may not be on the disk."""


def prepare(path: Path) -> None:
    """Checks the file and puts it into WAL mode, which stays with it: writers then do not stop readers."""
    connection = sqlite3.connect(path)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        said = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    finally:
        connection.close()
    if said != "ok":
        raise sqlite3.DatabaseError(said)


class Disk:
    """Waits until everything that was committed is on the disk; who comes while another waits shares the next wait."""

    def __init__(self, path: Path, fsync: Callable[[int], None] = os.fsync):
        self.log = path.with_name(path.name + "-wal")
        self.folder = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
        self._fsync, self._turn = fsync, asyncio.Lock()
        self._begun = self._done = 0

    async def sync(self) -> None:
        """Returns when every commit that returned before is on the disk; DiskError where that cannot be said."""
        wanted = self._begun + 1  # a wait that began already may have missed this commit
        async with self._turn:
            if self._done >= wanted:
                return
            self._begun += 1
            begun = self._begun
            await asyncio.to_thread(self._flush)
            self._done = begun

    def _flush(self) -> None:
        # a checkpoint that emptied the log has put its content into the database, synced
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
