"""Parses and builds by TensorRT for RTX itself, without a GPU: a child process of test_tensorrt_rtx.py.

What runs is the project's own build code, given this library for its `trt`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import tensorrt_rtx_bindings as trt

from vstar_engine.errors import VstarError
from vstar_engine.export import tensorrt_build, tensorrt_plugins, tensorrt_python_plugin


def plant(fault: str) -> None:
    """Makes the Python plugin wrong in one way."""
    made = tensorrt_python_plugin.classes
    if fault == "namespace":
        tensorrt_plugins.NAMESPACE = tensorrt_python_plugin.NAMESPACE = "elsewhere"
        return

    def classes(library: Any) -> tuple[type, type]:
        plugin, creator = made(library)
        if fault == "output type":
            plugin.get_output_data_types = lambda self, input_types: [library.DataType.FLOAT]  # type: ignore[attr-defined]
        if fault == "version":
            starts = creator.__init__  # type: ignore[misc]

            def init(self: Any) -> None:
                starts(self)
                self.plugin_version = "2"

            creator.__init__ = init  # type: ignore[misc]
        return plugin, creator

    tensorrt_python_plugin.classes = classes


def watch() -> list[list[Any]]:
    """Notes what TensorRT configures the Python plugin with: types, and the least and largest shape of each input."""
    seen: list[list[Any]] = []
    made = tensorrt_python_plugin.classes

    def classes(library: Any) -> tuple[type, type]:
        plugin, creator = made(library)

        def configure(self: Any, inputs: list[Any], outputs: list[Any]) -> None:
            tensors = [[x.desc.type.name, list(x.min), list(x.max)] for x in [*inputs, *outputs]]
            seen.append(tensors)

        plugin.configure_plugin = configure  # type: ignore[attr-defined]
        return plugin, creator

    tensorrt_python_plugin.classes = classes
    return seen


def main(request: dict[str, Any]) -> dict[str, Any]:
    said: list[str] = []
    seen = watch()
    plant(request.get("fault", ""))
    start = time.perf_counter()
    try:
        tensorrt_plugins.register(trt, request["plugin"])
        profiles = tensorrt_build.frame_profiles(tuple(request["frames"]), {name: tuple(r) for name, r in request["ranges"].items()})
        plan = tensorrt_build.Plan(profiles, targets=tuple(request.get("targets", ())), **request.get("plan", {}))
        out = Path(request["out"])
        facts = tensorrt_build.build_plan(trt, Path(request["onnx"]), out, plan, request["nodes"], said.append)
    except (VstarError, ValueError) as error:
        return {"error": str(error), "kind": type(error).__name__, "said": said}
    return {**facts, "configured": seen, "said": said, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
