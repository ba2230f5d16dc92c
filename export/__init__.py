"""Networks to files that other runtimes compile or run: ONNX, AOTInductor packages, TensorRT engines."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from vstar_engine.errors import MissingLibrary

# a back end that runs a built engine, and the module here whose `build`, `versions` and `estimate` make one
BUILDERS = {"onnxruntime": ".to_onnx", "inductor": ".to_inductor"}

Report = Callable[[str], None]


def builder_named(backend: str) -> ModuleType:
    """Gives the module that builds for a back end; ValueError lists those that can be, MissingLibrary says what to install."""
    if backend not in BUILDERS:
        raise ValueError(f"there is nothing to build for backend {backend!r}; engines are built for {', '.join(BUILDERS)}")
    try:
        return import_module(BUILDERS[backend], __name__)
    except ModuleNotFoundError as error:
        raise MissingLibrary(
            f"building for backend {backend} needs the {error.name} package; install it with `pip install vstar-engine[onnx]`"
        ) from error
