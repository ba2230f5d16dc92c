"""`vstar-engine serve` as a process of its own, on a port and in a folder of its own; also what the reliability tests kill."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

PAUSE = 0.02


def free_port() -> int:
    """Finds a port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """Starts, kills and ends a server; its log is the file `log` in the folder, over all its starts.

    `words` are options of `serve`; `prefix` goes before the command, such as a tracer's.
    """

    def __init__(
        self,
        folder: Path,
        words: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        patience: float = 120.0,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.data, self.log, self.patience = folder / "data", folder / "log", patience
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "vstar_engine", "serve", "--port", str(self.port), "--data", str(self.data)]
        self.command = [*prefix, *command, *words]
        self.environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def start(self, ready: bool = True) -> float:
        """Starts it; returns the seconds until it answered or, if `ready`, its engine was warm. RuntimeError where it ends."""
        begun = time.perf_counter()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environment, start_new_session=True
            )
        self.until("/readyz" if ready else "/livez")
        return time.perf_counter() - begun

    def until(self, path: str) -> None:
        """Waits until a probe says yes."""
        import httpx

        assert self.process is not None
        end = time.monotonic() + self.patience
        with httpx.Client(timeout=5) as http:
            while time.monotonic() < end:
                if self.process.poll() is not None:
                    raise RuntimeError(f"the server ended with {self.process.returncode}: {self.tail()}")
                try:
                    if http.get(self.url + path).status_code == 200:
                        return
                except httpx.TransportError:
                    time.sleep(PAUSE)
                    continue
                time.sleep(PAUSE)
        raise RuntimeError(f"{path} did not say yes in {self.patience:g} s: {self.tail()}")

    def kill(self) -> None:
        """Ends it without a word of warning (SIGKILL), its workers with it once they notice; nothing where none runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def stop(self, seconds: float = 60.0) -> int:
        """Asks it to end (SIGTERM), waits and returns its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def workers(self) -> "list[psutil.Process]":
        """Returns the processes in which its engine runs."""
        import psutil

        assert self.process is not None
        return [child for child in psutil.Process(self.process.pid).children() if _is_worker(child)]

    def memory(self) -> int:
        """Returns the resident bytes of the server without its workers."""
        import psutil

        assert self.process is not None
        return psutil.Process(self.process.pid).memory_info().rss

    def tail(self, lines: int = 5) -> str:
        """Returns the end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def _is_worker(process: "psutil.Process") -> bool:
    import psutil

    try:
        return "vstar_engine.serving.workers.worker" in process.cmdline()
    except psutil.NoSuchProcess:
        return False
