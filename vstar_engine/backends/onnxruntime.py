"""The UNet's ONNX file in ONNX Runtime, on the CPU or through its CUDA provider; tensors are bound in place."""

import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.errors import DeviceError, EngineError, MissingLibrary
from vstar_engine.machine import threads
from vstar_engine.networks.denoiser import Denoiser

from .inputs import full

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
TYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}
# errors that a session raises for a file; these classes share no base of their own
FAULTS = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented", "RuntimeException")
QUIET = 3  # errors only
NETWORK = "unet.onnx"


def library() -> Any:
    """Imports ONNX Runtime."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingLibrary(
            f"backend onnxruntime needs the onnxruntime package ({error}); install it with "
            "`pip install onnxruntime`, or onnxruntime-gpu for CUDA"
        ) from error
    return onnxruntime


def requirements(device: torch.device, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an engine depends on here: the kind of device and the library's version."""
    return {"device": device.type, "versions": {"onnxruntime": library().__version__}}


def check_links(artifact: BuiltEngine) -> None:
    """Raises EngineError where links of the engine lead the network and its weights to different folders."""
    network, weights = (artifact.folder / name for name in (NETWORK, f"{NETWORK}.data"))
    if weights.exists() and network.resolve().parent != weights.resolve().parent:
        raise EngineError(
            f"{weights} is a link out of the network's folder, which ONNX Runtime does not follow; "
            f"copy the engine with what its links lead to: cp -rL {shlex.quote(str(artifact.folder))} NEW"
        )


def load(artifact: BuiltEngine, *, device: torch.device, dtype: torch.dtype) -> "OnnxUnet":
    """Opens the engine's UNet. Raises DeviceError without a provider for the device, EngineError for a file it cannot read."""
    runtime = library()
    provider = PROVIDERS[device.type]
    if provider not in runtime.get_available_providers():
        raise DeviceError(f"this onnxruntime has no {provider} for device {device}; install onnxruntime-gpu, or use cpu")
    check_links(artifact)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its thread pool is separate from PyTorch's, and spins by default
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(threads.spins())))
    options.log_severity_level = QUIET
    where = {} if device.type == "cpu" else {"device_id": str(device.index or 0)}
    try:
        session = runtime.InferenceSession(str(artifact.file(NETWORK)), options, providers=[(provider, where)])
    except tuple(getattr(runtime.capi.onnxruntime_pybind11_state, name) for name in FAULTS) as error:
        raise EngineError(f"{artifact.folder} cannot be opened by ONNX Runtime: {str(error).splitlines()[0]}") from error
    # a provider that cannot start is dropped for the CPU's without an error
    if provider not in session.get_providers():
        raise DeviceError(f"onnxruntime has {provider}, but it does not start on device {device}: see its log, or use cpu")
    session.disable_fallback()

    return OnnxUnet(session, device, dtype)


class OnnxUnet(Denoiser):
    """A denoiser that runs an ONNX Runtime session."""

    def __init__(self, session: Any, device: torch.device, dtype: torch.dtype):
        self.session, self.device, self.dtype = session, device, dtype

    def __call__(self, latents: Tensor, timestep: Tensor, context: Tensor, fps: Tensor, tar: Tensor) -> Tensor:
        binding = self.session.io_binding()

        def bind(kind: str, name: str, tensor: Tensor) -> None:
            where = (self.device.type, self.device.index or 0)
            getattr(binding, f"bind_{kind}")(name, *where, TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr())

        given = full(latents.to(self.dtype), timestep, context, fps, tar)
        for name, tensor in given.items():
            bind("input", name, tensor)
        eps = torch.empty_like(given["latents"])
        bind("output", "eps", eps)
        if self.device.type == "cuda":  # the provider has a stream of its own
            torch.cuda.current_stream(self.device).synchronize()
        self.session.run_with_iobinding(binding)
        return eps
