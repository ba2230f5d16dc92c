"""The UNet as an AOTInductor package: compiled once for this processor, for any number of frames, loaded without a compiler.

On a CPU the project's fused ops stay calls in it: PyTorch's own products and norms took 1.6 to 1.8 times as long as eager.
"""

import errno
import io
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
import torch._inductor
from torch import Tensor, nn
from torch._inductor.codecache import cache_dir
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
from torch.export import Dim, ExportedProgram

from vstar_engine.artifacts.built_engine import MAX_BATCH
from vstar_engine.backends import eager
from vstar_engine.config.models import Spec
from vstar_engine.errors import ExportError, OutputError
from vstar_engine.kernels.dispatch import kept
from vstar_engine.weights import checkpoint

from .build_settings import Estimate, Settings
from .builders import Report, alive
from .traced_networks import Network, StreamingStep, streaming_step, unet

PACKAGE = "unet.pt2"
# of the mini model's 905 modules, whose package took 90 s on two quiet cores: the C++ compiler takes most of the time
MODULE_SECONDS = 0.1
COMPILER_BYTES = 2 * 2**30
# unlike the batch that is traced, so that one is not taken for the other
TRACED_TEXTS = 3


class TextsAxis(nn.Module):
    """The UNet on contexts (texts, B, T, L, C); what precedes the first cross-attention runs once for all texts of a video."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor, fps: Tensor, tar: Tensor) -> Tensor:
        # without these checks every input has a batch symbol of its own, and the number of texts cannot be derived
        for other in (timestep, context[0], fps, tar):
            torch._check(other.shape[0] == latents.shape[0])
        return self.module(latents, timestep, context.flatten(0, 1), fps, tar)


def with_texts_axis(network: Network) -> Network:
    """Returns the UNet as a package holds it."""
    context, dims = network.inputs["context"], network.dims["context"]
    return replace(
        network,
        module=TextsAxis(network.module),
        inputs={**network.inputs, "context": context.new_zeros(TRACED_TEXTS, *context.shape)},
        dims={**network.dims, "context": {0: Dim("texts", min=1, max=MAX_BATCH), **{axis + 1: dims[axis] for axis in dims}}},
        axes=("texts*batch", *network.axes[1:]),
    )


def options(settings: Settings) -> dict[str, Any]:
    """Returns further options that determine a package: none."""
    return {}


def estimate(settings: Settings) -> Estimate:
    """Estimates a build: the weights a few times over, and the compilers."""
    module = unet(settings.spec.unet, settings.dtype).module
    weights = sum(p.nbytes for p in module.parameters())
    seconds = MODULE_SECONDS * len(list(module.modules()))
    return Estimate(seconds, weights, 3 * weights + COMPILER_BYTES, "mini on two cores, 90 s; its memory was not measured")


def traced(settings: Settings, weights: Mapping[str, Tensor], report: Report) -> tuple[Network, ExportedProgram]:
    """Returns the UNet, on its device, as a graph for any number of frames."""
    report("loading the weights")
    module = eager.load(settings.spec, weights, device=settings.device, dtype=settings.dtype)
    network = with_texts_axis(unet(settings.spec.unet, settings.dtype, settings.cells).on(module, settings.device))
    with torch.no_grad(), alive(report, "tracing the unet"), kept() if settings.device.type == "cpu" else nullcontext():
        program = torch.export.export(network.module, (), network.inputs, dynamic_shapes=network.dims, strict=False)
    return network, program


def build(settings: Settings, weights: Mapping[str, Tensor], folder: Path, report: Report) -> dict[str, Any]:
    """Compiles the UNet into `folder`/unet.pt2.

    Raises ExportError with the compiler's words where it cannot, OutputError or OSError where a disk is full.
    """
    network, program = traced(settings, weights, report)
    compile_package(program, folder / PACKAGE, report)
    ops = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("vstar.")}
    return {"unet": network.described(), "ops": sorted(ops)}


def trace_streaming(spec: Spec, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> ExportedProgram:
    """Returns one step's network of a streaming model as a graph, for any batch and size."""
    described = streaming_step(spec, dtype)
    with torch.device("meta"):
        module = StreamingStep(spec)
    checkpoint.load(module, weights, described.prefix, device=device, dtype=dtype)
    network = described.on(module.eval().requires_grad_(False), device)
    with torch.no_grad(), kept() if device.type == "cpu" else nullcontext():
        return torch.export.export(network.module, (), network.inputs, dynamic_shapes=network.dims, strict=False)


def compile_package(program: ExportedProgram, path: Path, report: Report) -> None:
    """Compiles a traced network into a package; raises as `build` does."""
    # PyTorch's -march=native would take all that this very processor can; the identity names the vectors' instructions alone
    march = {"cpp.march": ""} if hasattr(torch._inductor.config.cpp, "march") else {}  # an older PyTorch cannot be told
    portable = torch._inductor.config.patch(march)
    with torch.no_grad(), alive(report, "compiling the unet"), portable, Package(path, "wb") as package:
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=package)
        except (InductorError, CppCompileError, InvalidCxxCompiler) as error:
            raise _answer(error) from error
    if package.fault is not None:
        raise package.fault


class Package(io.FileIO):
    """A file whose first failed write is kept in `fault`: PyTorch's writer would end the process where one fails."""

    fault: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes all of the data; a failure is kept in `fault`."""
        rest = memoryview(data)
        try:
            while rest and self.fault is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.fault = error
        return len(memoryview(data))


def _answer(error: Exception) -> ExportError | OutputError:
    if os.strerror(errno.ENOSPC) in str(error):
        return OutputError(
            f"no space is left for the compiler's files in {cache_dir()} or {gettempdir()}; "
            "free some, or name others with TORCHINDUCTOR_CACHE_DIR and TMPDIR"
        )
    return ExportError(f"the UNet cannot be compiled: {str(error).splitlines()[0]}")
