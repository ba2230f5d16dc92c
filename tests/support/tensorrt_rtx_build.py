"""Parses and builds by TensorRT for RTX itself, without a GPU: a child process of test_tensorrt_rtx.py.

What runs is the project's own build code, given this library for its `trt`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import tensorrt_rtx_bindings as trt

from vstar_engine.backends import tensorrt_plugins
from vstar_engine.errors import VstarError
from vstar_engine.export import tensorrt_plan
from vstar_engine.kernels.tensorrt import python_plugin


def plant(fault: str) -> None:
    """Makes the Python plugin wrong in one way."""
    made = python_plugin.classes
    if fault == "namespace":
        tensorrt_plugins.NAMESPACE = python_plugin.NAMESPACE = "elsewhere"
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

    python_plugin.classes = classes


def watch() -> list[list[Any]]:
    """Notes what TensorRT configures the Python plugin with: types, and the least and largest shape of each input."""
    seen: list[list[Any]] = []
    made = python_plugin.classes

    def classes(library: Any) -> tuple[type, type]:
        plugin, creator = made(library)

        def configure(self: Any, inputs: list[Any], outputs: list[Any]) -> None:
            tensors = [[x.desc.type.name, list(x.min), list(x.max)] for x in [*inputs, *outputs]]
            seen.append(tensors)

        plugin.configure_plugin = configure  # type: ignore[attr-defined]
        return plugin, creator

    python_plugin.classes = classes
    return seen


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Builds one file; returns the facts, or the sentence that refused it."""
    said: list[str] = []
    start = time.perf_counter()
    try:
        tensorrt_plugins.register(trt, job["plugin"])
        ranges = {name: tuple(sizes) for name, sizes in job["ranges"].items()}
        profiles = tensorrt_plan.frame_profiles(tuple(job["frames"]), ranges)
        plan = tensorrt_plan.Plan(profiles, targets=tuple(job.get("targets", ())), **job.get("plan", {}))
        facts = tensorrt_plan.build_plan(trt, Path(job["onnx"]), Path(job["out"]), plan, job["nodes"], said.append)
    except (VstarError, ValueError) as error:
        return {"error": str(error), "kind": type(error).__name__, "said": said}
    return {**facts, "said": said, "seconds": time.perf_counter() - start}


def main(request: dict[str, Any]) -> list[dict[str, Any]]:
    seen = watch()
    plant(request.get("fault", ""))
    results = []
    for job in request["jobs"]:
        seen.clear()
        results.append({**build(job), "configured": list(seen)})
    return results


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
