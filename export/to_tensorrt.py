"""The UNet as a TensorRT plan, for TensorRT and for TensorRT for RTX: through ONNX, with temporal attention as a plugin."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from vstar_engine.artifacts.built_engine import BuiltEngine, engines_root
from vstar_engine.artifacts.files import check_writable, make_private
from vstar_engine.backends import tensorrt_plugins
from vstar_engine.backends.tensorrt import PLAN
from vstar_engine.backends.tensorrt_library import library
from vstar_engine.kernels.gpu.temporal_attention_launch import ARCHITECTURES
from vstar_engine.kernels.source_hash import kernel_hash

from . import tensorrt_refit, to_onnx
from .build_settings import Estimate, Settings
from .builders import Report
from .tensorrt_plan import Plan, Ranges, build_plan, frame_profiles
from .traced_networks import unet

RTX = "tensorrt-rtx"
TARGETS = ("SM80", "SM86", "SM89", "SM120")
# assumed, since no GPU has timed a build: TensorRT tries many kernels for every layer of every profile
PROFILE_SECONDS = 120
# TensorRT for RTX on two cores: videocrafter2 in float16 with two profiles took 168 s with its ONNX file, and 11.8 GiB, of
# 2.63 GiB of weights; a plan with one profile of 0.53 GiB 8 s and 2.1 GiB
RTX_SECONDS_PER_BYTE = 1.9e-8
MEMORY_PER_BYTE = 4.5
BASIS = {
    "tensorrt": "no build: 120 s a profile and the memory that TensorRT for RTX took are assumed",
    RTX: "videocrafter2 with two profiles on two cores, 168 s and 11.8 GiB",
}


def architecture(settings: Settings) -> int:
    """Returns the architecture whose PTX the engine carries: the GPU's own, else sm_80's, which all later ones run."""
    major, minor = torch.cuda.get_device_capability(settings.device)
    own = 10 * major + minor
    return own if own in ARCHITECTURES and settings.compatibility != "ampere" else ARCHITECTURES[0]


def options(settings: Settings) -> dict[str, Any]:
    """Returns what else shapes a plan; ValueError for what does not go together."""
    to_onnx.check_format(settings.dtype, settings.opset)
    rtx = settings.backend == RTX
    chosen = {"plugin": tensorrt_plugins.choose(settings.plugin, rtx)}
    chosen |= {name: getattr(settings, name) for name in ("opset", "workspace", "level")}
    if rtx:
        return {**chosen, "targets": list(settings.targets or TARGETS)}
    return {**chosen, "refit": settings.refit, "compatibility": settings.compatibility}


def estimate(settings: Settings) -> Estimate:
    """Guesses what a build takes: the ONNX file on the way, the plan, and TensorRT's trials."""
    onnx, profiles = to_onnx.estimate_of(unet(settings.spec.unet, settings.dtype)), len(settings.frames)
    seconds = profiles * (RTX_SECONDS_PER_BYTE * onnx.disk if settings.backend == RTX else PROFILE_SECONDS)
    memory = max(onnx.memory, int(MEMORY_PER_BYTE * onnx.disk))
    return Estimate(onnx.seconds + seconds, 2 * onnx.disk, memory, BASIS[settings.backend])


def free_axes(settings: Settings) -> Ranges:
    """Returns the ranges of the axes but for frames: rows of a batch, and the size where it is free, up to the model's own."""
    batch = (1, min(2, settings.batch), settings.batch)
    if settings.size is not None:
        return {"batch": batch}
    unit = settings.spec.multiple // settings.spec.vae.factor
    height, width = (side // settings.spec.vae.factor for side in settings.spec.size)
    most = max(height, width)
    return {"batch": batch, "height": (unit, height, most), "width": (unit, width, most)}


def profiles(settings: Settings) -> tuple[Ranges, ...]:
    """Returns the ranges of a plan's profiles."""
    return frame_profiles(settings.frames, free_axes(settings))


def build(settings: Settings, weights: Mapping[str, Tensor], folder: Path, report: Report) -> dict[str, Any]:
    """Builds `folder`/unet.plan; the ONNX file goes when it is done. Raises ExportError with TensorRT's words."""
    trt, chosen = library(settings.backend), options(settings)
    rtx = settings.backend == RTX
    if settings.timing_cache is not None:
        check_writable(settings.timing_cache, force=True)
    network = unet(settings.spec.unet, settings.dtype, settings.cells)
    with TemporaryDirectory(dir=folder) as work:
        path = Path(work) / "unet.onnx"
        facts = to_onnx.write(network, weights, path, settings.opset, report)
        tensorrt_plugins.register(trt, chosen["plugin"], None if rtx else architecture(settings))
        plan = Plan(
            profiles(settings),
            workspace=settings.workspace,
            level=settings.level,
            refit=settings.refit,
            compatibility=settings.compatibility,
            targets=tuple(chosen.get("targets", ())),
            timing_cache=None if rtx else settings.timing_cache or _timing_cache(trt, settings.device),
        )
        wanted = 0 if chosen["plugin"] == "none" else network.attentions
        built = build_plan(trt, path, folder / PLAN, plan, wanted, report, inspected=not rtx)
    return {"unet": facts, "plan": built}


def _timing_cache(trt: Any, device: torch.device) -> Path:
    """Names the file of TensorRT's timings: they hold for a version, an architecture, and our kernel, which it cannot tell."""
    folder = engines_root() / ".timing"
    make_private(folder)
    major, minor = torch.cuda.get_device_capability(device)
    return folder / f"tensorrt-{trt.__version__}-sm_{major}{minor}-{kernel_hash()[:12]}.cache"


def refit(
    settings: Settings, artifact: BuiltEngine, weights: Mapping[str, Tensor], folder: Path, report: Report
) -> dict[str, Any]:
    """Writes the engine's plan with other weights of the same shapes into `folder` without a build; returns the facts.

    Raises EngineError for a plan that was not built for it, or that the weights do not fit.
    """
    trt, kind, facts = library(settings.backend), artifact.identity["options"]["plugin"], artifact.manifest["facts"]
    if kind in ("cpp", "python"):
        tensorrt_plugins.register(trt, kind)
    with TemporaryDirectory(dir=folder) as work:
        path = Path(work) / "unet.onnx"
        report(f"writing the new weights to {path.name}")
        to_onnx.write(unet(settings.spec.unet, settings.dtype, settings.cells), weights, path, settings.opset, report)
        refitted = tensorrt_refit.refit_plan(trt, artifact.file(PLAN), path, folder / PLAN, report)
    return {**facts, "plan": {**facts["plan"], **refitted}}
