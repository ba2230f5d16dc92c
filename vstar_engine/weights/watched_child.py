"""A child process that reads a file we do not trust: started, watched, and read by a pipe of its own.

What else the child prints (a `sitecustomize` that greets, a library's banner) is no answer: answers come by the pipe alone, and
a failure is also the exit code.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vstar_engine.errors import CheckpointError, OutputError
from vstar_engine.machine import threads

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
KINDS = {"CheckpointError": CheckpointError, "OutputError": OutputError}


def run_watched(
    module: str,
    arguments: dict[str, Any],
    source: Path,
    limit: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Runs `module` on JSON `arguments` and returns when it has succeeded; raises the error that it tells of.

    A child that holds more than `limit` bytes of private memory is stopped.
    """
    import psutil

    receiving, sending = os.pipe()
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", f"vstar_engine.weights.{module}", json.dumps({**arguments, "report": sending})],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd=ROOT,
            env=threads.environment(),
            pass_fds=(sending,),
        )
    except BaseException:
        os.close(receiving)
        raise
    finally:
        os.close(sending)
    assert child.stderr is not None
    failure: dict[str, str] = {}
    complaint: list[str] = []

    def listen() -> None:
        with open(receiving, encoding="utf-8") as lines:
            for line in lines:
                message = json.loads(line)
                if "done" in message and on_progress:
                    on_progress(message["done"], message["total"])
                if "warning" in message:
                    log.warning(message["warning"])
                if "error" in message:
                    failure.update(message)

    ears = [threading.Thread(target=listen), threading.Thread(target=complaint.extend, args=(child.stderr,))]
    for ear in ears:
        ear.start()
    try:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            held = _private_bytes(process)
            if held > limit:
                raise CheckpointError(
                    f"reading {source} took {held / 2**20:.0f} MiB where {limit / 2**20:.0f} MiB should do, so it was stopped; "
                    "it is no ordinary checkpoint, or --memory-limit must be raised"
                )
            time.sleep(0.02)
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
        for ear in ears:
            ear.join()
    if failure:
        raise KINDS[failure["kind"]](failure["error"])
    if child.returncode:
        said = [line.strip() for line in complaint if line.strip()]
        last = said[-1] if said else f"exit status {child.returncode}"
        raise CheckpointError(f"{source} could not be read as a checkpoint: {last}")


def _private_bytes(process: Any) -> int:
    import psutil

    try:
        memory = process.memory_info()
    except psutil.NoSuchProcess:
        return 0
    return memory.rss - getattr(memory, "shared", 0)  # mapped pages of the file itself can be dropped at any time


Tell = Callable[..., None]


class _Warnings(logging.Handler):
    def __init__(self, tell: Tell):
        super().__init__(logging.WARNING)
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self.tell(warning=record.getMessage())


@contextmanager
def reporting() -> Iterator[tuple[dict[str, Any], Tell]]:
    """In the child: yields its arguments and a function that tells the watching process something.

    The package's warnings are told too; an error ends the child with code 1.
    """
    arguments = json.loads(sys.argv[1])
    with open(arguments.pop("report"), "w", encoding="utf-8") as pipe:

        def tell(**message: Any) -> None:
            print(json.dumps(message), file=pipe, flush=True)

        logging.getLogger("vstar_engine").addHandler(_Warnings(tell))
        try:
            yield arguments, tell
        except (CheckpointError, OutputError) as error:
            tell(error=str(error), kind=type(error).__name__)
            sys.exit(1)
