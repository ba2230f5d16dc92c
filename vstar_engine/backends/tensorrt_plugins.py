"""Registers one of three TensorRT plugins for temporal attention; all have the same name, version and namespace.

`aot`: PTX inside the engine, TensorRT only. `cpp`: the library built from csrc/tensorrt, for both libraries.
`python`: a class that launches the Triton kernel, for both. `none`: TensorRT composes the layer from standard operators.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from vstar_engine.errors import EngineError
from vstar_engine.kernels.source_hash import kernel_hash
from vstar_engine.kernels.tensorrt.names import NAME, NAMESPACE, VERSION

KINDS = ("auto", "aot", "cpp", "python", "none")
# environment variable with the path of the C++ plugin's library
LIBRARY = "VSTAR_TENSORRT_PLUGIN"

# the kind and the objects registered in each library's module; the registry does not keep Python objects alive
_registered: dict[str, tuple[str, Any]] = {}


def library() -> Path | None:
    """Returns the C++ plugin's library, if VSTAR_TENSORRT_PLUGIN names one; ValueError where it is not there."""
    named = os.environ.get(LIBRARY)
    if not named:
        return None
    if not Path(named).is_file():
        raise ValueError(f"{LIBRARY} names {named}, which is not a file; build the plugin in csrc/tensorrt, or unset it")
    return Path(named)


def needed_library() -> Path:
    """Returns the C++ plugin's library; ValueError where none is named."""
    path = library()
    if path is None:
        raise ValueError(f"the cpp plugin needs {LIBRARY} to name the library built from csrc/tensorrt")
    return path


def versions(kind: str) -> dict[str, str]:
    """Returns the hash of the library that `cpp` runs, on which an engine depends; nothing for other kinds.

    Raises EngineError for a library that was built from other kernels.
    """
    if kind != "cpp":
        return {}
    path = needed_library()
    content = path.read_bytes()
    if kernel_hash().encode() not in content:
        raise EngineError(f"{path} was built from other kernels than are installed here; build it again: csrc/tensorrt")
    return {"cpp plugin": hashlib.sha256(content).hexdigest()}


def autoloaded() -> list[Path]:
    """Returns the library that registers the C++ plugin when it is loaded, and the plugin's library, which it loads."""
    path = needed_library()
    opener = path.with_name(f"{path.stem}_autoload{path.suffix}")
    if not opener.is_file():
        raise ValueError(f"there is no {opener}, which csrc/tensorrt builds beside {path.name}; set {LIBRARY} where both are")
    return [opener, path]


def choose(kind: str, rtx: bool) -> str:
    """Resolves `auto`, and raises ValueError for a plugin that cannot serve."""
    if kind not in KINDS:
        raise ValueError(f"plugin must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "auto":
        return "aot" if not rtx else "cpp" if library() else "python"
    if kind == "aot" and rtx:
        raise ValueError("TensorRT for RTX takes no quickly deployable plugins; use --plugin python, cpp or auto")
    if kind == "cpp":
        needed_library()
    return kind


def register(trt: Any, kind: str, arch: int | None = None) -> None:
    """Registers a plugin of a chosen kind in this process, once; `arch` is what the PTX of `aot` is compiled for.

    Raises EngineError where another was registered before: TensorRT would take either.
    """
    wanted = f"{kind} for sm_{arch}" if kind == "aot" else kind
    before = _registered.get(trt.__name__, ("", None))[0]
    if kind == "none" or before == wanted:
        return
    if before or trt.get_plugin_registry().get_creator(NAME, VERSION, NAMESPACE) is not None:
        raise EngineError(
            f"this process has registered the plugin {before or 'of another origin'} already; run {wanted} in a new process"
        )
    _registered[trt.__name__] = (wanted, _register(trt, kind, arch))
    if trt.get_plugin_registry().get_creator(NAME, VERSION, NAMESPACE) is None:
        raise EngineError(f"TensorRT {trt.__version__} did not take the {kind} plugin into its registry")


def _register(trt: Any, kind: str, arch: int | None) -> Any:
    """Registers a plugin and returns the objects that must live as long as the registry."""
    if kind == "aot":
        from vstar_engine.kernels.tensorrt import aot_plugin

        assert arch is not None
        return aot_plugin.register(trt, arch)
    if kind == "python":
        from vstar_engine.kernels.tensorrt import python_plugin

        creator = python_plugin.classes(trt)[1]()
        # the parser reads the creator's own namespace, the registry the one given here
        trt.get_plugin_registry().register_creator(creator, NAMESPACE)
        return creator
    return trt.get_plugin_registry().load_library(str(needed_library()))
