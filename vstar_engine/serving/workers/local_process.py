"""The engine in a child process of the server."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from vstar_engine.machine import threads
from vstar_engine.serving.jobs import result_files
from vstar_engine.serving.settings import Settings

from .dispatch_state import BatchingPolicy, Message
from .dispatcher import Dispatcher

log = logging.getLogger(__name__)

MODEL = "vstar_engine.serving.workers.engine_renderer:load"
# the longest line in bytes: a batch of jobs with the longest texts
LINE = 64 * 2**20
PACKAGE_ROOT = Path(__file__).parents[3]
DEFAULT_POLICY = BatchingPolicy()


class ProcessLink:
    """A worker in a child process, connected by a socket pair; it ends with this process."""

    def __init__(self, folder: Path, environment: Mapping[str, str], owner: str):
        self.name, self.folder, self.environment, self.owner = "the worker", folder, environment, owner
        self.child: asyncio.subprocess.Process | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def open(self, message: Message) -> AsyncIterator[Message]:
        """Starts a child; returns an iterator over its messages."""
        # no child is running, so nothing with this owner is being written
        result_files.sweep(self.folder, self.owner)
        ours, theirs = socket.socketpair()
        with theirs:
            # -P: a module of the folder that the server was started in is not the child's
            command = (sys.executable, "-P", "-m", "vstar_engine.serving.workers.worker", str(theirs.fileno()))
            environment = threads.environment({**os.environ, **self.environment})
            paths = [environment.get("PYTHONPATH"), str(PACKAGE_ROOT)]
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
            self.child = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, pass_fds=(theirs.fileno(),), env=environment
            )
        reader, self.writer = await asyncio.open_unix_connection(sock=ours, limit=LINE)
        self.name = f"the worker (process {self.child.pid})"
        self.send({**message, "folder": str(self.folder), "owner": self.owner})
        return _messages(reader)

    def send(self, message: Message) -> None:
        """Sends a message; one to a dead child is lost."""
        assert self.writer is not None
        self.writer.write(json.dumps(message).encode() + b"\n")

    async def kill(self) -> None:
        """Kills the child, also one that is stopped by SIGSTOP, and waits for its end."""
        if self.child is None:
            return
        if self.child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                # Popen.kill would reap the child, and asyncio would not see its exit code
                os.kill(self.child.pid, signal.SIGKILL)
        code = await self.child.wait()
        log.info("%s ended with %d", self.name, code)
        if self.writer is not None:
            self.writer.close()


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[Message]:
    while True:
        try:
            line = await reader.readline()
        except ConnectionError:
            return
        if not line.endswith(b"\n"):  # the end, or a line cut off by it
            return
        yield json.loads(line)


class ProcessEngine(Dispatcher):
    """An `EngineClient` whose worker is a child process.

    folder: where results go; engines with another `instance` may share it.
    factory: MODULE:FUNCTION that returns the child's `Renderer`, called with `settings`.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        policy: BatchingPolicy = DEFAULT_POLICY,
        factory: str = MODEL,
        environment: Mapping[str, str] | None = None,
        instance: str = Settings.instance,
    ):
        self.folder = folder.absolute()
        self.link = ProcessLink(self.folder, environment or {}, result_files.owner_of(instance))
        super().__init__([self.link], {"factory": factory, "settings": dict(settings)}, policy)

    @property
    def pid(self) -> int | None:
        """Returns the child's process id; None before the start."""
        return None if self.link.child is None else self.link.child.pid

    async def start(self) -> None:
        """Creates the folder, starts the child and waits until it is warm."""
        self.folder.mkdir(parents=True, exist_ok=True)
        await super().start()
