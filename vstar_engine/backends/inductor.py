"""The UNet compiled ahead of time by AOTInductor, loaded from its package without compiling anything."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import Tensor

from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.errors import EngineError, OutputError

# registers the ops that a package calls by name
from vstar_engine.kernels.cpu import (
    calls,  # noqa: F401
    library,
)
from vstar_engine.machine.device import current, described
from vstar_engine.networks.denoiser import Denoiser

from .inputs import shared

MIB = 2**20


def requirements(device: torch.device, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an engine depends on here: the processor it was compiled for and PyTorch's version."""
    # instruction sets that PyTorch's compiler uses, beyond the vector width that the capability names
    taken = {"VNNI": torch.cpu._is_vnni_supported, "AMX": torch.cpu._is_amx_tile_supported} if device.type == "cpu" else {}
    more = [name for name, has in taken.items() if has()]
    return {"device": " ".join([described(device), *more]), "versions": {"torch": torch.__version__}}


def has_texts_axis(artifact: BuiltEngine) -> bool:
    """Returns whether a package takes context as (texts, batch, frames, 77, C)."""
    inputs = artifact.manifest["facts"].get("unet", {}).get("inputs", ())
    return any(given["name"] == "context" and given["shape"][0] == "texts" for given in inputs)


def check_room(package: Path) -> None:
    """Checks the folder that PyTorch unpacks a package into.

    Raises OutputError where it cannot hold it, EngineError where it is mounted noexec, so that no library in it can be loaded.
    """
    # not tempfile.gettempdir(), which falls back to another folder where this one is full
    folder = Path(os.environ.get("TMPDIR") or "/tmp")
    needed = package.stat().st_size
    if folder.is_dir() and (free := shutil.disk_usage(folder).free) < needed:
        raise OutputError(
            f"PyTorch unpacks {package} into {folder}, which has {free // MIB} MiB free where it takes {-(-needed // MIB)}; "
            "free some, or name another folder with TMPDIR"
        )
    if folder.is_dir() and os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise EngineError(
            f"PyTorch unpacks {package} into {folder} and loads it from there, which its mount forbids (noexec); "
            "name another folder with TMPDIR"
        )


def load(artifact: BuiltEngine, *, device: torch.device, dtype: torch.dtype) -> "InductorUnet":
    """Opens the engine's package.

    Raises EngineError where PyTorch cannot open it or CPU kernels that it calls are missing, OutputError without disk space.
    """
    if "vstar.linear.default" in artifact.manifest["facts"].get("ops", ()) and not library.status()[0]:
        raise EngineError(f"{artifact.folder} calls the CPU kernels: {library.status()[1]}")
    if not has_texts_axis(artifact):
        raise EngineError(
            f"{artifact.folder} was built before packages took several texts for each video; rebuild it: {artifact.command()}"
        )
    index, path = -1 if device.index is None else device.index, artifact.file("unet.pt2")
    check_room(path)
    try:
        package = torch._inductor.aoti_load_package(str(path), device_index=index)
    except RuntimeError as error:
        raise EngineError(f"{artifact.folder} cannot be opened by PyTorch: {str(error).splitlines()[0]}") from error

    return InductorUnet(package, device, dtype)


class InductorUnet(Denoiser):
    """A denoiser that runs a compiled package."""

    def __init__(self, package: Callable[..., Tensor], device: torch.device, dtype: torch.dtype):
        self.package, self.device, self.dtype = package, device, dtype

    def __call__(self, latents: Tensor, timestep: Tensor, context: Tensor, fps: Tensor, tar: Tensor) -> Tensor:
        # the package launches on the current device's stream
        with current(self.device):
            return self.package(**shared(latents.to(self.dtype), timestep, context, fps, tar))
