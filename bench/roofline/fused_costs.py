"""What fusing saves in one step, network, guidance and update: operators launched, the bytes they move, and their floor.

It is counted, nothing is computed. Each operator reads its inputs and writes its outputs once; one of PyTorch's may need more,
as a norm that reads twice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vstar_engine.bench.harness.random_networks import lay_out, step_inputs
from vstar_engine.bench.harness.rows import ResultFile, ResultRow
from vstar_engine.bench.ops.pytorch_layers import in_one_go, unfused
from vstar_engine.bench.ops.temporal_transformer import without_waste
from vstar_engine.bench.step.ladder import LAYERS, OURS, SPATIAL, batched
from vstar_engine.bench.step.workload import TAR, ByPasses, temporal_transformers
from vstar_engine.config.models import Spec
from vstar_engine.kernels.guided_step import COEFFICIENTS
from vstar_engine.kernels.temporal_attention import toeplitz_bias
from vstar_engine.networks import fp8
from vstar_engine.networks.step import Conditioning, NetworkCall, SamplingStep, StepInputs
from vstar_engine.networks.unet import UNet
from vstar_engine.sampling.tar import toeplitz

from .op_costs import Machine, Op, shapes_alone, traced_call

SUITE = "roofline"
OPERATORS, ATTENTION, FUSED, STEM, ENGINE, PRODUCTS, SMALL_OPERATORS, SMALL_LINEAR, SMALL_CONVOLUTIONS, SMALL = (
    "PyTorch's operators",
    "fused attention",
    "fused layers too",
    "shared stem too",
    "the whole step too",
    "Triton's products too",
    "`--fast fp8`, PyTorch's products",
    "`--fast fp8`, linear layers alone",
    "`--fast fp8`, convolutions alone",
    "`--fast fp8`",
)
# from nothing of ours to what the engine does, then on a GPU where each shape's product is timed to be faster by Triton; and
# the whole step with its layers in FP8, whose products run at twice the rate, by PyTorch where it says so and else by Triton
IN_FP8 = (SMALL_OPERATORS, SMALL_LINEAR, SMALL_CONVOLUTIONS, SMALL)
STAGES = (OPERATORS, ATTENTION, FUSED, STEM, ENGINE, PRODUCTS, *IN_FP8)
WHOLE = (ENGINE, PRODUCTS, *IN_FP8)


def network(spec: Spec, stage: str, frames: int) -> UNet:
    """Builds the network without data at one of STAGES; clean passes are the attention that is not fused."""
    unet = UNet(spec.unet).eval()
    if stage == PRODUCTS:
        return in_one_go(unet)
    if stage in IN_FP8:
        left = {SMALL_LINEAR: False, SMALL_CONVOLUTIONS: True}.get(stage)
        fp8.convert(unet, {name: 1.0 for name, layer in fp8.layers(unet).items() if flat(layer) is not left})
        return unfused(unet, fp8.Fp8Linear) if stage == SMALL_OPERATORS else in_one_go(unet)
    if stage in (FUSED, STEM, ENGINE):
        return unet
    unfused(unet, *OURS[LAYERS], *OURS[SPATIAL])
    if stage == OPERATORS:
        for module, level in temporal_transformers(unet):
            sigma = None if level is None else TAR.sigma.get(level)
            bias = None if sigma is None else toeplitz_bias(toeplitz(frames, sigma)[None], frames, frames)[0]
            module.__class__ = ByPasses
            vars(module)["attend"] = without_waste(bias)
    return unet


def flat(layer: fp8.Layer) -> bool:
    """Returns whether a layer is a matrix product."""
    return layer.weight[0, 0].numel() == 1


def ops_at(spec: Spec, stage: str, frames: int, size: tuple[int, ...], dtype: torch.dtype) -> list[Op]:
    """Traces one guided step at one of STAGES."""
    with shapes_alone(dtype):
        unet = lay_out(network(spec, stage, frames), "channels_last")
        latents, timestep, context, fps, tar = step_inputs(spec, size, frames, "cpu", dtype)
        clean, noise, tar = latents.float(), torch.empty_like(latents, dtype=torch.float32), tar.float()
        if stage in WHOLE:
            # what is made once a video is not counted
            timesteps, context_kv = unet.timestep_table(timestep[0], fps), unet.prepare_context(context[:1], context[1:, :1])
            weights, plain = torch.empty(1, len(COEFFICIENTS), dtype=torch.float32), torch.ones(1, dtype=torch.int64)
            taken = StepInputs(clean, timesteps.rows[0], fps, tar, weights, noise, plain)
            step = SamplingStep(dtype, timesteps, (NetworkCall((0,), Conditioning((), context_kv)),), taken)
            return traced_call(lambda: unet.run_step(step))
        inputs = [latents, timestep, context, fps, tar]
        _, *rest = inputs if stage == STEM else batched(inputs)

        def passes() -> Tensor:
            x = clean.to(dtype)
            return by_passes(clean, unet(x if stage == STEM else torch.cat([x, x]), *rest), noise)

        return traced_call(passes)


def by_passes(latents: Tensor, eps: Tensor, noise: Tensor) -> Tensor:
    """Returns guidance and DDIM's update by PyTorch's operators, with numbers of no step in particular."""
    cond, uncond = eps.float().chunk(2)
    e = uncond + 12.0 * (cond - uncond)
    finished = (latents - 0.6 * e) / 0.8 / 0.9
    return 0.85 * finished + 0.5 * e + 0.1 * noise


def count(
    spec: Spec, frames: int, size: tuple[int, ...], dtype: torch.dtype, machine: Machine, rows: ResultFile
) -> list[ResultRow]:
    """Writes a row for each of STAGES and returns them; they are computed, not measured."""
    case = {"part": "fusion", "model": spec.name, "frames": frames, "size": "x".join(map(str, size))}
    most = {"flops_per_second": machine.flops, "bytes_per_second": machine.bandwidth}
    return [
        rows.write(ResultRow(SUITE, case, stage, str(dtype)[6:], "computed", numbers=totals(found, machine), ceilings=most))
        for stage, found in ((stage, ops_at(spec, stage, frames, size, dtype)) for stage in STAGES)
    ]


def totals(ops: Sequence[Op], machine: Machine) -> dict[str, float]:
    """Adds up operators, FLOPs, bytes and floors."""
    flops, moved = (sum(getattr(op, name) for op in ops) for name in ("flops", "bytes"))
    return {"ops": len(ops), "flops": flops, "bytes": moved, "floor": sum(op.floor(machine) for op in ops)}
