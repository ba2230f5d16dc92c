"""The UNet compiled ahead of time by AOTInductor, loaded from its package without compiling anything."""

from collections.abc import Mapping
from typing import Any

import torch
import torch._inductor
from torch import Tensor

from ..built import Artifact
from ..device import current, described
from ..errors import EngineError

# registers the ops that a package calls by name
from ..kernels import groupnorm_silu, linear, native, temporal_attention  # noqa: F401
from . import Denoiser
from .inputs import shared


def machine(device: torch.device, options: Mapping[str, Any]) -> dict[str, Any]:
    """Says what an engine depends on here: the processor it was compiled for and PyTorch's version."""
    # what else PyTorch's compiler takes of a CPU beside the vectors that its capability names
    taken = {"VNNI": torch.cpu._is_vnni_supported, "AMX": torch.cpu._is_amx_tile_supported} if device.type == "cpu" else {}
    more = [name for name, has in taken.items() if has()]
    return {"device": " ".join([described(device), *more]), "versions": {"torch": torch.__version__}}


def hears_texts(artifact: Artifact) -> bool:
    """Says whether a package takes context as (texts, batch, frames, 77, C)."""
    inputs = artifact.manifest["facts"].get("unet", {}).get("inputs", ())
    return any(given["name"] == "context" and given["shape"][0] == "texts" for given in inputs)


def load(artifact: Artifact, *, device: torch.device, dtype: torch.dtype) -> Denoiser:
    """Opens the engine's package; EngineError where PyTorch cannot, or where the ops that it calls have no library."""
    if "vstar.linear.default" in artifact.manifest["facts"].get("ops", ()) and not native.status()[0]:
        raise EngineError(f"{artifact.folder} calls the CPU kernels: {native.status()[1]}")
    if not hears_texts(artifact):
        raise EngineError(
            f"{artifact.folder} was built before packages took several texts a video; rebuild it: {artifact.command()}"
        )
    index = -1 if device.index is None else device.index
    try:
        package = torch._inductor.aoti_load_package(str(artifact.file("unet.pt2")), device_index=index)
    except RuntimeError as error:
        raise EngineError(f"{artifact.folder} cannot be opened by PyTorch: {str(error).splitlines()[0]}") from error

    def denoise(latents: Tensor, timestep: Tensor, context: Tensor, fps: Tensor, tar: Tensor) -> Tensor:
        # the package launches on the current device's stream
        with current(device):
            return package(**shared(latents.to(dtype), timestep, context, fps, tar))

    return denoise
