"""Who builds for which back end, who writes for which server, and how long steps are reported."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import Event, Thread
from types import ModuleType

from vstar_engine.backends import TENSORRT
from vstar_engine.errors import MissingLibrary

# a back end that runs a built engine, and the module here whose `build`, `versions` and `estimate` make one
BUILDERS = {"onnxruntime": ".to_onnx", "inductor": ".to_inductor", **dict.fromkeys(TENSORRT, ".to_tensorrt")}


# other servers that a built engine can be written for
EXPORTERS = {"triton-server": ".to_triton_server"}


Report = Callable[[str], None]


# seconds between two words about a long step
PATIENCE = 5.0


def silent(line: str) -> None:
    """Ignores progress reports."""


@contextmanager
def alive(report: Report, step: str, patience: float = PATIENCE) -> Iterator[None]:
    """Reports a silent step and, from a thread, every few seconds the time that it has taken."""
    report(step)
    start, over = time.monotonic(), Event()

    def say() -> None:
        while not over.wait(patience):
            report(f"{step}: {time.monotonic() - start:.0f} s so far")

    thread = Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def builder_named(backend: str) -> ModuleType:
    """Returns the module that builds for a back end; ValueError lists the known ones, MissingLibrary says what to install."""
    if backend not in BUILDERS:
        raise ValueError(f"there is nothing to build for backend {backend!r}; engines are built for {', '.join(BUILDERS)}")
    return _imported(BUILDERS[backend], f"building for backend {backend}")


def exporter_named(kind: str) -> ModuleType:
    """Returns the module that writes engines for another server; MissingLibrary says what to install."""
    return _imported(EXPORTERS[kind], f"export for {kind}")


def _imported(module: str, purpose: str) -> ModuleType:
    try:
        return import_module(module, __package__)
    except ModuleNotFoundError as error:
        raise MissingLibrary(
            f"{purpose} needs the {error.name} package; install it with `pip install onnx onnxruntime onnxscript`"
        ) from error
