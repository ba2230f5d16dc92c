"""One guided step by built engines: by those of a user and eager in turn, or by one built here of a workload's weights."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.backends import EAGER, TENSORRT, backend_named, eager
from vstar_engine.backends.inputs import shared
from vstar_engine.bench.harness.contest import Contest, NotHere, Provider
from vstar_engine.bench.harness.random_networks import GUIDANCE_BRANCHES, relative_error, step_inputs
from vstar_engine.bench.ops.temporal_transformer import WIDER
from vstar_engine.engine import Engine
from vstar_engine.errors import EngineError, MissingLibrary
from vstar_engine.export.build_settings import Settings
from vstar_engine.export.builders import builder_named, silent
from vstar_engine.loading import open_weights
from vstar_engine.networks.denoiser import Denoiser
from vstar_engine.weights import key_map

from .openvino_step import OpenVinoUnet
from .workload import ERROR_BUDGET, Workload

# what must be one for a contest
SHARED = ("model", "dtype", "size", "weights")


def contest(folders: Sequence[Path], frames: int) -> Contest:
    """Sets built engines against eager; ValueError for engines that do not answer the same question."""
    artifacts = [BuiltEngine.open(folder) for folder in folders]
    first = artifacts[0]
    for artifact in artifacts[1:]:
        for name in SHARED:
            if artifact.identity[name] != first.identity[name]:
                raise ValueError(f"{artifact.folder} and {first.folder} differ in {name}; compare engines of one")
    engines = [Engine.load(engine=artifact, text=None) for artifact in artifacts]
    spec, device, dtype = engines[0].spec, engines[0].device, engines[0].dtype
    size = tuple(first.identity["size"] or spec.size)
    for artifact in artifacts:
        artifact.check_clip(frames, size, rows=2)
    weights = open_weights(spec, first.manifest["weights_path"], first.manifest["loras"])
    inputs = step_inputs(spec, size, frames, device, dtype)

    def network(kind: torch.dtype) -> Denoiser:
        return eager.load(spec, weights, device=device, dtype=kind)

    latents, timestep, context, *rest = inputs
    wide = WIDER[dtype]
    wanted = network(wide)(latents.to(wide), timestep, context.to(wide), *rest)

    def given(denoiser: Denoiser) -> Callable[[], Callable[[], Tensor]]:
        return lambda: partial(denoiser, *inputs)

    providers = [Provider(EAGER, given(network(dtype)))]
    for artifact, engine in zip(artifacts, engines, strict=True):
        facts = {"build": artifact.manifest["seconds"], "bytes": artifact.bytes}
        providers.append(Provider(artifact.identity["backend"], given(engine.denoiser), traced=False, facts=facts))
        if artifact.identity["options"].get("inline"):
            file = artifact.file("unet.onnx")
            providers.append(Provider("openvino", lambda file=file: partial(OpenVinoUnet(file, dtype), *inputs), traced=False))
    case = {"part": "step", "model": spec.name, "frames": frames, "size": "x".join(map(str, size))}
    return Contest("engine", case, dtype, device, providers, lambda _, eps: relative_error(eps, wanted), ERROR_BUDGET[dtype])


def tensorrt_here(device: torch.device) -> str:
    """Names the back end of the TensorRT that is installed; MissingLibrary where none is, NotHere without a GPU."""
    from vstar_engine.backends.tensorrt_library import library

    missing = []
    for backend in TENSORRT:
        try:
            library(backend)
        except MissingLibrary as reason:
            missing.append(str(reason))
            continue
        if device.type != "cuda":
            raise NotHere(f"{backend} needs a GPU")
        return backend
    raise MissingLibrary("; ".join(missing))


def built(workload: Workload, backend: str) -> tuple[Denoiser, dict[str, Any]]:
    """Builds a workload's network for a back end as `vstar-engine build` does, loads it, and says what that took.

    Where the workload has another compiler than inductor, the graph that would be compiled runs itself.
    """
    builder, weights = builder_named(backend), official(workload.unet(workload.dtype, "channels_last"))
    frames = (workload.frames,) if backend in TENSORRT else ()
    wanted = {
        "dtype": workload.dtype,
        "device": workload.device,
        "frames": frames,
        "size": workload.size,
        "batch": GUIDANCE_BRANCHES,
    }
    settings = Settings(workload.spec, backend, **wanted)
    if backend == "inductor" != workload.compiler:
        # without its guards: they tell sizes of 1 apart, which the graph computes as any
        program = builder.traced(settings, weights, silent)[1].module(check_guards=False)
        return TracedGraph(program), {"backend": "none: the traced graph itself"}
    stages: dict[str, float] = {}

    def report(line: str) -> None:
        stages.setdefault(line.partition(": ")[0], time.monotonic())  # a long one is announced again and again
        print(f"{backend}: {line}", flush=True)

    # a temporary folder's files are gone when the network is loaded
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        facts = builder.build(settings, weights, Path(folder), report)
        seconds = time.monotonic() - begun
        files = [{"name": path.name, "bytes": path.stat().st_size} for path in Path(folder).iterdir() if path.is_file()]
        manifest = {"identity": {"options": builder.options(settings)}, "facts": facts, "files": files}
        artifact = BuiltEngine(Path(folder), manifest)
        try:
            denoiser = backend_named(backend).load(artifact, device=workload.device, dtype=workload.dtype)
        except EngineError as error:
            raise RuntimeError(str(error)) from error
    marks = [*stages.values(), begun + seconds]
    taken = {line: after - before for line, before, after in zip(stages, marks, marks[1:], strict=False)}
    return denoiser, {"backend": backend, "build": seconds, "stages": taken, "package_bytes": artifact.bytes}


class TracedGraph(Denoiser):
    """Runs a traced graph as PyTorch's operators."""

    def __init__(self, program: nn.Module):
        self.program = program

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.program(**shared(*inputs))


def official(unet: nn.Module) -> Mapping[str, Tensor]:
    """Returns a network's parameters by their official names, as a checkpoint has them."""
    found: dict[str, Tensor] = {}
    for name, parameter in unet.named_parameters():
        names = key_map.official_names(name)
        found |= {key_map.UNET + part: x for part, x in zip(names, parameter.chunk(len(names)), strict=True)}
    return found
