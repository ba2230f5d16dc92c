"""The UNet as a plan of TensorRT for RTX: built on any machine, finished by the GPU that loads it."""

from collections.abc import Mapping
from typing import Any

import torch

from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.errors import EngineError
from vstar_engine.machine.device import described

from . import tensorrt_plugins
from .tensorrt import TensorrtUnet, open_plan
from .tensorrt_library import library


def requirements(device: torch.device, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an engine depends on: library and plugin. Any machine may build it; `load` looks at the GPU."""
    versions = {"tensorrt-rtx": library("tensorrt-rtx").__version__, **tensorrt_plugins.versions(options["plugin"])}
    return {"device": "cuda", "versions": versions}


def load(artifact: BuiltEngine, *, device: torch.device, dtype: torch.dtype, graphs: bool = True) -> TensorrtUnet:
    """Opens the engine's plan as the back end `tensorrt` does; EngineError also for a GPU that is not among its targets."""
    trt, options = library("tensorrt-rtx"), artifact.identity["options"]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        here, targets = f"SM{major}{minor}", options["targets"]
        if here not in targets:
            said = f"{artifact.folder} was built for {', '.join(targets)}, got {described(device)}"
            rebuild = artifact.command(options={**options, "targets": [*targets, here]})
            raise EngineError(f"{said}; build one for it: {rebuild}")
    return open_plan(trt, artifact, device, dtype, graphs)
