"""Finds TensorRT's Python library, checks its version and collects its log."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from vstar_engine.errors import MissingLibrary

# a back end's modules, in the order in which they are tried, and the command that installs one
LIBRARIES = {
    "tensorrt": (("tensorrt",), "pip install tensorrt-cu13"),
    "tensorrt-rtx": (
        ("tensorrt_rtx", "tensorrt_rtx_bindings"),
        "pip install tensorrt-rtx-cu13",
    ),
}

# the oldest supported versions; the parser of TensorRT for RTX before 1.7 took no plugins
OLDEST = {"tensorrt": (10, 13), "tensorrt-rtx": (1, 7)}


def library(backend: str) -> Any:
    """Imports the library of a back end; MissingLibrary where it is absent or too old."""
    names, install = LIBRARIES[backend]
    for name in names:
        try:
            trt = import_module(name)
        except ModuleNotFoundError as error:
            missing = error
            continue
        except (ImportError, FileNotFoundError) as error:
            raise MissingLibrary(f"backend {backend} finds {name}, which cannot be loaded: {error}") from error
        if tuple(map(int, trt.__version__.split(".")[:2])) < OLDEST[backend]:
            oldest = ".".join(map(str, OLDEST[backend]))
            raise MissingLibrary(f"backend {backend} needs {name} {oldest} or newer, got {trt.__version__}")
        return trt
    raise MissingLibrary(f"backend {backend} needs the {names[0]} package ({missing}); install it with `{install}`")


def make_logger(trt: Any, report: Callable[[str], None]) -> Any:
    """Returns a logger that reports warnings and collects errors in `.errors`, for the message of a step that fails."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                report(f"TensorRT: {message}")

    return Logger()
