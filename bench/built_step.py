"""One guided step by built engines and by eager, in turn, on the same weights and inputs."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vstar_engine.backends import EAGER, Denoiser, eager
from vstar_engine.built import Artifact
from vstar_engine.engine import Engine, open_weights

from .contest import Contest, Provider
from .scene import ERROR_BUDGET
from .seeded import relative_error, step_inputs
from .transformer import WIDER

# what must be one for a contest
SHARED = ("model", "dtype", "size", "weights")


def contest(folders: Sequence[Path], frames: int) -> Contest:
    """Sets built engines against eager; ValueError for engines that do not answer the same question."""
    artifacts = [Artifact.open(folder) for folder in folders]
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
    case = {"part": "step", "model": spec.name, "frames": frames, "size": "x".join(map(str, size))}
    return Contest("engine", case, dtype, device, providers, lambda _, eps: relative_error(eps, wanted), ERROR_BUDGET[dtype])
