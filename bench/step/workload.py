"""One model at one size and length: its networks, a sampling step's inputs, and what that step should give."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vstar_engine.backends import eager
from vstar_engine.bench.harness.block_costs import count_flops
from vstar_engine.bench.harness.random_networks import lay_out, seeded, seeded_unet, step_inputs
from vstar_engine.bench.ops.temporal_transformer import WIDER, Attend, transformer_by_passes, without_waste
from vstar_engine.config.models import MODELS, Spec, UNetSpec, model_named
from vstar_engine.config.sampling import Tar
from vstar_engine.kernels.temporal_attention import toeplitz_bias
from vstar_engine.networks.blocks import TemporalTransformer
from vstar_engine.networks.unet import UNet
from vstar_engine.sampling.tar import toeplitz
from vstar_engine.weights import bundled, checkpoint, key_map

# relative L2 of a forward against the same weights in WIDER. On a CPU a right one shows 3e-3 in float16 (mini and full width),
# 2.3e-2 in bfloat16 and up to 6e-6 in float32; one without the regulariser 0.08 (full width, 2 frames) to 0.18 (mini, 4)
ERROR_BUDGET = {torch.float16: 2e-2, torch.bfloat16: 5e-2, torch.float32: 2e-5}
TAR = Tar()
# how torch.compile may search: its own modes, and its longest search for matrix products alone, which ends in minutes
GEMM = "max-autotune-gemm"
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", GEMM)
GEMM_OPTIONS: dict[str, bool | str] = {"max_autotune_gemm": True, "max_autotune_conv_backends": "ATEN"}
TINY = replace(
    MODELS["mini"],
    name="tiny",
    unet=UNetSpec(
        model_channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_levels=(0,),
        head_dim=8,
        context_dim=64,
        norm_groups=8,
    ),
    size=(32, 32),
)


class ByPasses(TemporalTransformer):
    """A temporal transformer whose attention is `attend`, around which everything is copied as it needs."""

    attend: Attend

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return transformer_by_passes(self, self.attend, x)


def spec_named(name: str) -> Spec:
    """Looks a model up; `tiny` is what rehearsals run."""
    return TINY if name == TINY.name else model_named(name)


def sharing(unet: UNet) -> UNet:
    """Copies the modules of a network around the same parameters."""
    return copy.deepcopy(unet, {id(parameter): parameter for parameter in unet.parameters()})


def temporal_transformers(unet: UNet) -> list[tuple[TemporalTransformer, int | None]]:
    """Lists the temporal transformers with their levels; the stem's has none."""
    stages: list[Any] = [*unet.input_blocks, unet.middle_block, *unet.output_blocks]
    stem = [(layer, None) for layer in getattr(unet, "init_attn", ())]
    return stem + [(layer, stage.level) for stage in stages for layer in stage if isinstance(layer, TemporalTransformer)]


@dataclass(frozen=True)
class Workload:
    """What a step is measured on: `compiler` is torch.compile's back end and `mode` of MODES its search, if it is inductor."""

    model: str
    frames: int
    size: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    compiler: str = "inductor"
    mode: str = "max-autotune-no-cudagraphs"

    @property
    def case(self) -> dict[str, Any]:
        return {"model": self.model, "frames": self.frames, "size": "x".join(map(str, self.size))}

    @property
    def search(self) -> str:
        """Names how torch.compile searches here."""
        return self.mode if self.compiler == "inductor" else self.compiler

    def compiled(self, unet: UNet) -> Callable[..., Tensor]:
        """Hands a network to torch.compile, whole and for its shapes alone."""
        chosen: dict[str, Any] = {}
        if self.compiler == "inductor":
            chosen = {"options": GEMM_OPTIONS} if self.mode == GEMM else {"mode": self.mode}
        return torch.compile(unet, backend=self.compiler, fullgraph=True, dynamic=False, **chosen)

    @property
    def spec(self) -> Spec:
        return spec_named(self.model)

    @cached_property
    def base(self) -> dict[tuple[torch.dtype, str], UNet]:
        return {}

    def unet(self, dtype: torch.dtype, layout: str) -> UNet:
        """Returns the network in one dtype and layout; in each dtype the weights are those of the run's, exactly."""
        if (dtype, layout) not in self.base:
            unet = seeded_unet(self.spec.unet, self.device, self.dtype).to(dtype)
            self.base[dtype, layout] = lay_out(unet, layout)
        return self.base[dtype, layout]

    @cached_property
    def inputs(self) -> list[Tensor]:
        """Returns both guidance branches in one call that shares what it can: latents, timestep, context, fps, tar."""
        return step_inputs(self.spec, self.size, self.frames, self.device, self.dtype)

    def inputs_as(self, dtype: torch.dtype) -> list[Tensor]:
        latents, timestep, context, *rest = self.inputs
        return [latents.to(dtype), timestep, context.to(dtype), *rest]

    def bias(self, level: int | None) -> Tensor | None:
        """Returns the (T, T) matrix of a level's regulariser, None where it has none."""
        sigma = self.sigma(level)
        if sigma is None:
            return None
        g = toeplitz(self.frames, sigma)[None].to(self.device)
        return toeplitz_bias(g, self.frames, self.frames)[0]

    def sigma(self, level: int | None) -> float | None:
        return None if level is None else TAR.sigma.get(level)

    def by_passes(self, unet: UNet, attend: Callable[[int | None], Attend] | None) -> UNet:
        """Returns the network, sharing its parameters, with `attend(level)` in place of the op where there is one."""
        unet = sharing(unet)
        if attend is None:
            return unet
        for module, level in temporal_transformers(unet):
            module.__class__ = ByPasses
            vars(module)["attend"] = attend(level)
        return unet

    @cached_property
    def wanted(self) -> Tensor:
        """Returns what the step should give: the definition in a wider dtype, without our kernels."""
        wide = WIDER[self.dtype]
        unet = self.by_passes(self.unet(wide, "contiguous"), lambda level: without_waste(self.bias(level)))
        wanted = unet(*self.inputs_as(wide))
        del self.base[wide, "contiguous"]
        return wanted

    @cached_property
    def flops(self) -> dict[str, float]:
        return count_flops(self.spec.unet, self.inputs)


def trained_unet(spec: Spec, device: torch.device, dtype: torch.dtype) -> UNet:
    """Returns a model's UNet as the engine runs it, with its own weights where they come with the package, else seeded ones."""
    unet = seeded(lambda: eager.kind(device)(spec.unet), device, dtype)
    if spec.name in bundled.BUNDLED:
        checkpoint.load(unet, checkpoint.Weights(bundled.weights(spec)), key_map.UNET, device=device, dtype=dtype)
    return unet
