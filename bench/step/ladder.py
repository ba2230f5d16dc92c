"""One sampling step, from the published behaviour to the engine's, by improvements that can each be left out."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vstar_engine.backends.cuda_graphs import Recording
from vstar_engine.bench.harness.ceilings import ceilings
from vstar_engine.bench.harness.contest import Contest, NotHere, Provider
from vstar_engine.bench.harness.random_networks import relative_error, seeded
from vstar_engine.bench.ops.attention_providers import check_ours
from vstar_engine.bench.ops.pytorch_layers import map_pages, unfused
from vstar_engine.bench.ops.temporal_transformer import Attend, as_published, with_hoisted, without_waste
from vstar_engine.machine import malloc
from vstar_engine.networks.blocks import SpatialBlock
from vstar_engine.networks.layers import Linear, Norm
from vstar_engine.networks.unet import UNet
from vstar_engine.networks.vae import Vae

from .compiled_step import built, tensorrt_here
from .workload import ERROR_BUDGET, Workload

HOISTED, CLEAN, DTYPE, BATCHED, TEXT = "hoisted g", "no waste", "dtype", "batched guidance", "text K/V once"
LAST, FUSED, COMPILE, GRAPH = "channels-last", "fused kernel", "torch.compile", "CUDA graph"
LAYERS, SPATIAL, PAGES, STEM = "fused layers", "spatial attention", "kept pages", "shared stem"
AOTI, TENSORRT = "AOTInductor", "TensorRT"
# in the order they are added; what each does
IMPROVEMENTS = {
    HOISTED: "the bias matrix is made once, not on the host in every call",
    CLEAN: "no unused softmax and no attention maps kept; plain layers by PyTorch's own attention",
    DTYPE: "the run's dtype instead of float32",
    BATCHED: "both guidance branches in one batch",
    TEXT: "the text's keys and values, and what blocks add for the timestep, are computed once for all steps (not compiled)",
    LAST: "convolutions on channels-last memory",
    FUSED: "temporal attention by our kernel, reading the fused projection in place",
    LAYERS: "norms with SiLU, GEGLU, and on a CPU projections with bias and residual or gate, each in one go",
    SPATIAL: "on a CPU, spatial attention by our kernel too",
    PAGES: "on a CPU, memory stays with the process between operators",
    STEM: "both guidance branches share what comes before the first cross-attention",
    COMPILE: "torch.compile, by default with its longest search",
    GRAPH: "the step recorded as one CUDA graph",
    AOTI: "instead of both the package that `vstar-engine build` makes",
    TENSORRT: "instead of these the plan that it makes, by TensorRT or else TensorRT for RTX",
}
# the whole network built anew: each stands for itself, nothing is added to it
BUILT = frozenset({AOTI, TENSORRT})
COMPILED = BUILT | {COMPILE}
BASELINE = frozenset({HOISTED, CLEAN, DTYPE, BATCHED, LAST})
ENGINE = BASELINE | {TEXT, FUSED, LAYERS, SPATIAL, PAGES, STEM}
# what is compiled here is named with its search behind it
HEADLINE = {
    "ours": ENGINE,
    "ours, CUDA graph": ENGINE | {GRAPH},
    "clean eager": BASELINE,
    "published": frozenset[str](),
    "clean compiled": BASELINE | {COMPILE},
    "ours compiled": ENGINE | {COMPILE},
    "ours, AOTInductor": ENGINE | {AOTI},
}

# layers that compute by PyTorch's own operators unless the improvement is there
OURS: dict[str, tuple[type[nn.Module], ...]] = {LAYERS: (Norm, Linear), SPATIAL: (SpatialBlock,)}


class Step:
    """Builds the step of a workload with any set of improvements; gives both branches' noise (2, C, T, H, W)."""

    def __init__(self, workload: Workload):
        self.workload = workload
        self.built: dict[frozenset[str], Callable[[], Tensor]] = {}
        self.packages: dict[frozenset[str], dict[str, Any]] = {}
        self.kept: dict[str, Tensor] = {}

    def call(self, features: frozenset[str]) -> Callable[[], Tensor]:
        """Returns the step as a call; built once."""
        if features not in self.built:
            self.built[features] = self._build(features)
        return self.built[features]

    def _build(self, features: frozenset[str]) -> Callable[[], Tensor]:
        workload = self.workload
        if GRAPH in features:
            if workload.device.type != "cuda":
                raise NotHere("a CUDA graph needs a GPU")
            return recorded(self.call(features - {GRAPH}), workload.device)
        if FUSED in features:
            check_ours(workload.device)
        calls = self._built(features) if features & BUILT else self._branches(features)
        pages = malloc.keep_pages if PAGES in features else map_pages

        def step() -> Tensor:
            if workload.device.type == "cpu":
                pages()
            return torch.cat([call() for call in calls]) if len(calls) > 1 else calls[0]()

        return step

    def _built(self, features: frozenset[str]) -> list[Callable[[], Tensor]]:
        backend = tensorrt_here(self.workload.device) if TENSORRT in features else "inductor"
        denoiser, self.packages[features] = built(self.workload, backend)
        return [partial(denoiser, *self.workload.inputs_as(self.workload.dtype))]

    def _branches(self, features: frozenset[str]) -> list[Callable[[], Tensor]]:
        """Returns a call for both guidance branches, or one for each."""
        inputs = self.workload.inputs_as(self.workload.dtype if DTYPE in features else torch.float32)
        if BATCHED not in features:
            return [self._forward(features, _branch(inputs, i)) for i in range(2)]
        return [self._forward(features, inputs if STEM in features else batched(inputs))]

    def _forward(self, features: frozenset[str], inputs: list[Tensor]) -> Callable[[], Tensor]:
        unet: Any = self.network(features)
        if COMPILE in features:
            return partial(self.workload.compiled(unet), *inputs)
        if TEXT in features:
            latents, timestep, context, fps, tar = inputs
            timesteps = unet.timestep_table(timestep[0], fps)
            return partial(unet, latents, timesteps.embedding(timesteps.rows[0]), unet.prepare_context(context), fps, tar)
        return partial(unet, *inputs)

    def network(self, features: frozenset[str], regularised: bool = True) -> UNet:
        """Returns the network that a set of improvements leads to, sharing its parameters with others.

        Without `regularised` attention by passes leaves TAR out; the kernel reads it from its input.
        """
        workload = self.workload
        dtype = workload.dtype if DTYPE in features else torch.float32
        unet = workload.unet(dtype, "channels_last" if LAST in features else "contiguous")

        def attend(level: int | None) -> Attend:
            level = level if regularised else None
            if CLEAN in features:
                return without_waste(workload.bias(level))
            if HOISTED in features:
                return with_hoisted(workload.bias(level), self.kept, str(level))
            return as_published(workload.sigma(level), self.kept, str(level))

        unet = workload.by_passes(unet, None if FUSED in features else attend)
        plain = [kind for feature, kinds in OURS.items() if feature not in features for kind in kinds]
        return unfused(unet, *plain)

    def provider(self, name: str, features: frozenset[str]) -> Provider:
        """Names a set of improvements as a provider."""
        facts: dict[str, Any] = {"features": sorted(features)}
        if COMPILE in features:
            facts["compiler"] = self.workload.search

        def prepare() -> Callable[[], Tensor]:
            if name in (f"+ {DTYPE}", f"all but {DTYPE}") and self.workload.dtype == torch.float32:
                raise NotHere("the run's dtype is float32")
            if name.endswith((SPATIAL, PAGES)) and self.workload.device.type != "cpu":
                raise NotHere("only a CPU has that")
            call = self.call(features)
            facts.update(self.packages.get(features, {}))
            return call

        return Provider(name, prepare, traced=not features & {*COMPILED, GRAPH}, facts=facts)

    def with_preview(self) -> Provider:
        """Returns the published step with its preview: the whole clip decoded after every step."""
        workload = self.workload

        def prepare() -> Callable[[], Tensor]:
            vae = seeded(lambda: Vae(workload.spec.vae, encoder=False), workload.device, torch.float32)
            step = self.call(frozenset())

            def call() -> Tensor:
                noise = step()
                vae.decode(noise[:1])
                return noise

            return call

        return Provider("published, with preview", prepare)

    def contest(self, part: str, providers: Iterable[Provider]) -> Contest:
        """Sets providers against each other on this step."""
        workload = self.workload
        return Contest(
            *("pipeline", {"part": part, **workload.case}, workload.dtype, workload.device, list(providers)),
            lambda name, answer: relative_error(answer, workload.wanted),
            ERROR_BUDGET[workload.dtype],
            flops=workload.flops["whole"],
            ceilings=ceilings(workload.device, workload.dtype),
        )

    def ladder(self, without: Iterable[str] = ()) -> Contest:
        """Returns the published step, then one improvement more at a time; those named in `without` are left out."""
        added: list[str] = []
        providers = [self.with_preview(), self.provider("published", frozenset())]
        for name in IMPROVEMENTS:
            if name in BUILT - {*without}:
                providers.append(self.provider(f"or {name}", ENGINE | {name}))
            elif name not in without:
                added.append(name)
                providers.append(self.provider(f"+ {name}", frozenset(added)))
        return self.contest("ladder", providers)

    def ablation(self, without: Iterable[str] = ()) -> Contest:
        """Returns all improvements that need no compiler, then all but one."""
        every = frozenset(IMPROVEMENTS) - {*COMPILED, GRAPH, *without}
        # a hoisted bias is part of what has no waste, and the kernel has neither
        single = [name for name in IMPROVEMENTS if name in every - {HOISTED, CLEAN}]
        providers = [self.provider("all", every)]
        return self.contest("ablation", providers + [self.provider(f"all but {name}", every - {name}) for name in single])

    def headline(self, without: Iterable[str] = (), chosen: Sequence[str] = tuple(HEADLINE)) -> Contest:
        """Returns the engine against clean baselines, `chosen` of them; the published step is there to be labelled as such."""
        sets = {name: features for name, features in HEADLINE.items() if name in chosen and not features & {*without}}
        names = {name: f"{name}, {self.workload.search}" if COMPILE in features else name for name, features in sets.items()}
        return self.contest("headline", [self.provider(names[name], features) for name, features in sets.items()])


def _branch(inputs: list[Tensor], i: int) -> list[Tensor]:
    """Returns one guidance branch."""
    latents, timestep, context, *rest = inputs
    return [latents, timestep, context[i : i + 1], *rest]


def batched(inputs: list[Tensor]) -> list[Tensor]:
    """Returns both branches as two videos of a batch, which share nothing but the regulariser."""
    latents, timestep, context, fps, tar = inputs
    return [latents.repeat(2, 1, 1, 1, 1), timestep.repeat(2, 1), context, fps.repeat(2), tar]


def recorded(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Records a call as a CUDA graph when it is first made; every replay writes the same tensor."""
    recording = Recording(call, device)
    recording()
    return recording
