"""Back ends that run the denoiser: a module each, with `load`, which imports its library when it is chosen.

`eager` runs weights: `load(spec, weights, *, device, dtype, spatial_attention, graphs)`. Every other one runs a built engine:
`load(artifact, *, device, dtype)`, and for TensorRT `graphs`. `requirements(device, options)` returns the device and library
versions that an engine built here depends on.
"""

from importlib import import_module
from types import ModuleType

EAGER = "eager"
TENSORRT = {"tensorrt": ".tensorrt", "tensorrt-rtx": ".tensorrt_rtx"}
BACKENDS = {EAGER: ".eager", "onnxruntime": ".onnxruntime", "inductor": ".inductor", **TENSORRT}


def backend_named(name: str) -> ModuleType:
    """Returns a back end's module; ValueError lists the known ones."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known backends: {', '.join(BACKENDS)}")
    return import_module(BACKENDS[name], __name__)
