"""The UNet as an AOTInductor package: compiled once for this processor, for any number of frames, loaded without a compiler."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import Tensor
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
from torch.export import ExportedProgram

from vstar_engine.backends import eager
from vstar_engine.errors import ExportError

from . import Report
from .network import Network, unet
from .settings import Estimate, Settings

PACKAGE = "unet.pt2"
# guesses for two cores, from packages of the mini model on a busy machine: the C++ compiler takes most of the time
MODULE_SECONDS = 0.3
COMPILER_BYTES = 2 * 2**30


def options(settings: Settings) -> dict[str, Any]:
    """Gives what else shapes a package: nothing."""
    return {}


def estimate(settings: Settings) -> Estimate:
    """Guesses what a build takes: the weights a few times over, and the compilers."""
    module = unet(settings.spec.unet, settings.dtype).module
    weights = sum(p.nbytes for p in module.parameters())
    return Estimate(MODULE_SECONDS * len(list(module.modules())), weights, 3 * weights + COMPILER_BYTES)


def traced(settings: Settings, weights: Mapping[str, Tensor], report: Report) -> tuple[Network, ExportedProgram]:
    """Gives the UNet, on its device, as a graph for any number of frames."""
    report("loading the weights")
    module = eager.load(settings.spec, weights, device=settings.device, dtype=settings.dtype)
    network = unet(settings.spec.unet, settings.dtype, settings.cells).on(module, settings.device)
    report("tracing the unet")
    with torch.no_grad():
        program = torch.export.export(network.module, (), network.inputs, dynamic_shapes=network.dims, strict=False)
    return network, program


def build(settings: Settings, weights: Mapping[str, Tensor], folder: Path, report: Report) -> dict[str, Any]:
    """Compiles the UNet into `folder`/unet.pt2; ExportError with the compiler's words where it cannot."""
    network, program = traced(settings, weights, report)
    report("compiling the unet")
    try:
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(program, package_path=str(folder / PACKAGE))
    except (InductorError, CppCompileError, InvalidCxxCompiler) as error:
        raise ExportError(f"the UNet cannot be compiled: {str(error).splitlines()[0]}") from error
    return {"unet": network.described()}
