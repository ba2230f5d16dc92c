"""The UNet as a TensorRT plan: bound once for each shape, run on PyTorch's current stream, replayed as a CUDA graph.

TensorRT reads and writes PyTorch's tensors in place. A shape's first call is enqueued on the caller's tensors and loads every
kernel. The second call is captured on tensors with fixed addresses, and later calls replay it. Each shape has its own execution
context, since a graph records the state of the context that it was captured from. Contexts run one at a time and share their
working memory.
"""

import logging
import mmap
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.errors import DeviceError, EngineError
from vstar_engine.machine.device import current, described
from vstar_engine.networks.denoiser import Denoiser

from . import tensorrt_plugins
from .cuda_graphs import Recent, Recording
from .inputs import in_full
from .tensorrt_library import library, make_logger

PLAN = "unet.plan"
# bytes, as `setTensorAddress` requires
ALIGNMENT = 256

log = logging.getLogger(__name__)


def requirements(device: torch.device, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an engine depends on here: the library's version, the plugin's, and the GPU, as its compatibility asks."""
    versions = {"tensorrt": library("tensorrt").__version__, **tensorrt_plugins.versions(options["plugin"])}
    if device.type != "cuda":
        raise DeviceError(
            "backend tensorrt builds and runs on an NVIDIA GPU; use --device cuda, or backend tensorrt-rtx to build"
        )
    return {"device": gpu(device, options["compatibility"]), "versions": versions}


def gpu(device: torch.device, compatibility: str) -> str:
    """Names the GPUs that can run an engine built on this one; DeviceError for `ampere` on an older GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    if compatibility == "ampere" and major < 8:
        raise DeviceError(
            f"--compatibility ampere is for GPUs of sm_80 and later, got {described(device)}; use capability or exact"
        )
    return {"exact": described(device), "capability": f"any sm_{major}{minor}", "ampere": "any from sm_80 on"}[compatibility]


def load(artifact: BuiltEngine, *, device: torch.device, dtype: torch.dtype, graphs: bool = True) -> "TensorrtUnet":
    """Opens the engine's plan. Raises MissingLibrary, DeviceError without a GPU, EngineError where TensorRT cannot load it."""
    return open_plan(library("tensorrt"), artifact, device, dtype, graphs)


def open_plan(trt: Any, artifact: BuiltEngine, device: torch.device, dtype: torch.dtype, graphs: bool = True) -> "TensorrtUnet":
    """Loads a plan and the plugin that it was built with."""
    if device.type != "cuda":
        raise DeviceError(f"a TensorRT engine runs on an NVIDIA GPU, got device {device}; use --device cuda")
    if artifact.identity["options"].get("refit") == "stripped":
        raise EngineError(f"{artifact.folder} holds no weights; fill it: vstar-engine refit {artifact.folder} --weights DIR")
    kind = artifact.identity["options"]["plugin"]
    if kind in ("cpp", "python"):  # the PTX of `aot` lies in the plan
        tensorrt_plugins.register(trt, kind)
    logger = make_logger(trt, log.info)
    with artifact.file(PLAN).open("rb") as file, current(device):
        plan = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        said = "; ".join(logger.errors[:2]) or "it gives no reason"
        raise EngineError(f"TensorRT {trt.__version__} cannot load {artifact.folder}: {said}; rebuild it: {artifact.command()}")
    return TensorrtUnet(trt, engine, device, dtype, graphs, keep=(runtime, logger))


class BoundShape:
    """One shape's execution context: run on the caller's tensors, or with `records` as a CUDA graph from the second call on."""

    def __init__(self, context: Any, memory: Tensor, records: bool):
        self.context, self.memory, self.records = context, memory, records
        self.fixed: dict[str, Tensor] = {}
        self.replayed: Recording | None = None
        self.warm = False

    def __call__(self, given: Mapping[str, Tensor]) -> Tensor:
        """Runs on inputs with every axis expanded; the caller owns the result."""
        if not (self.records and self.warm):
            self.warm = True
            return self._directly(given)
        if self.replayed is None:
            self._fix(given)
        for name, tensor in given.items():
            self.fixed[name].copy_(tensor)
        assert self.replayed is not None
        # the next replay writes the same memory
        return self.replayed().clone()

    def _directly(self, given: Mapping[str, Tensor]) -> Tensor:
        """Enqueues on the caller's tensors, copied where TensorRT cannot read them, and on a new tensor for the result."""
        eps = torch.empty(given["latents"].shape, dtype=given["latents"].dtype, device=given["latents"].device)
        # keeps copies alive until they are enqueued
        read = {name: aligned(tensor) for name, tensor in given.items()}
        self._address({**read, "eps": eps})
        return enqueue(self.context, eps)

    def _fix(self, given: Mapping[str, Tensor]) -> None:
        """Allocates the tensors that the graph reads and writes."""
        # tensors made outside inference mode may be written inside it and outside
        with torch.inference_mode(False):
            shaped = {**given, "eps": given["latents"]}
            self.fixed = {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in shaped.items()}
        self._address(self.fixed)
        self.replayed = Recording(partial(enqueue, self.context, self.fixed["eps"]), self.memory.device)
        self.replayed.runs = 1  # the plain run that comes before a capture

    def _address(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not self.context.set_tensor_address(name, tensor.data_ptr()):
                raise EngineError(f"TensorRT does not take {tuple(tensor.shape)} {tensor.dtype} for {name}")


def aligned(tensor: Tensor) -> Tensor:
    """Returns a tensor that is contiguous and aligned to ALIGNMENT, as TensorRT requires: a copy where it is not."""
    plain = tensor.contiguous()
    return plain.clone() if plain.data_ptr() % ALIGNMENT else plain


def enqueue(context: Any, eps: Tensor) -> Tensor:
    """Enqueues a context on the current stream; returns its output tensor."""
    if not context.execute_async_v3(stream_of(eps.device)):
        raise EngineError("TensorRT failed to run the engine; its log gives the reason")
    return eps


def stream_of(device: torch.device) -> int:
    """Returns the handle of PyTorch's current stream."""
    return torch.cuda.current_stream(device).cuda_stream


class TensorrtUnet(Denoiser):
    """A denoiser that runs a deserialised engine."""

    def __init__(
        self,
        trt: Any,
        engine: Any,
        device: torch.device,
        dtype: torch.dtype,
        records: bool = False,
        keep: tuple[Any, ...] = (),
    ):
        self.trt, self.engine, self.dtype, self.records, self.keep = trt, engine, dtype, records, keep
        self.bound: Recent[tuple[int, ...], BoundShape] = Recent()
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)
        # with an index even where `device` has none: another GPU may be current at a call
        self.device = self.memory.device

    def profile(self, shape: tuple[int, ...]) -> int:
        """Returns the index of the profile that holds the latents' shape; EngineError lists the shapes it takes."""
        ranges = [
            self.engine.get_tensor_profile_shape("latents", index) for index in range(self.engine.num_optimization_profiles)
        ]
        for index, (low, _, high) in enumerate(ranges):
            if all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
                return index
        taken = ", ".join(f"{tuple(low)} to {tuple(high)}" for low, _, high in ranges)
        raise EngineError(f"the engine takes latents of {taken}, got {shape}; build one with the frames and size that you need")

    def _bind(self, given: Mapping[str, Tensor]) -> BoundShape:
        context = self.engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        stream = stream_of(self.device)
        context.set_optimization_profile_async(self.profile(tuple(given["latents"].shape)), stream)
        for name, tensor in given.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise EngineError(f"the engine does not take {tuple(tensor.shape)} for {name}")
        needed = context.update_device_memory_size_for_shapes()
        if needed > self.memory.nbytes:
            # contexts that are bound already keep theirs
            self.memory = torch.empty(needed, dtype=torch.uint8, device=self.device)
        context.set_device_memory(self.memory.data_ptr(), self.memory.nbytes)
        return BoundShape(context, self.memory, self.records)

    def __call__(self, latents: Tensor, timestep: Tensor, context: Tensor, fps: Tensor, tar: Tensor) -> Tensor:
        with current(self.device):
            given = in_full(latents.to(self.dtype), timestep, context, fps, tar)
            bound = self.bound.take(tuple(given["latents"].shape), lambda: self._bind(given))
            return bound(given)
