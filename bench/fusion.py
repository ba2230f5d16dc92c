"""What fusing saves in one forward, counted without computing: operators launched, bytes they move, and their floor.

Each operator reads its inputs and writes its outputs once; one of PyTorch's may need more, as a norm that reads twice.
"""

from collections.abc import Sequence

import torch

from vstar_engine.config import Spec
from vstar_engine.kernels.temporal_attention import toeplitz_bias
from vstar_engine.memory import without_data
from vstar_engine.tar import toeplitz
from vstar_engine.unet import UNet

from .ladder import LAYERS, OURS, SPATIAL, batched
from .ops import Machine, Op, traced
from .plain import by_operators, in_one_go
from .rows import Row, Rows
from .scene import TAR, ByPasses, temporal_transformers
from .seeded import step_inputs
from .transformer import without_waste

SUITE = "roofline"
OPERATORS, ATTENTION, FUSED, ENGINE, PRODUCTS = (
    "PyTorch's operators",
    "fused attention",
    "fused layers too",
    "shared stem too",
    "Triton's products too",
)
# from nothing of ours to what the engine does, the last on a GPU where each shape's product is timed to be faster by Triton
STAGES = (OPERATORS, ATTENTION, FUSED, ENGINE, PRODUCTS)


def network(spec: Spec, stage: str, frames: int) -> UNet:
    """Builds the network without data at one of STAGES; clean passes are the attention that is not fused."""
    unet = UNet(spec.unet).eval()
    if stage == PRODUCTS:
        return in_one_go(unet)
    if stage in (FUSED, ENGINE):
        return unet
    by_operators(unet, *OURS[LAYERS], *OURS[SPATIAL])
    if stage == OPERATORS:
        assert TAR is not None
        for module, level in temporal_transformers(unet):
            sigma = None if level is None else TAR.sigma.get(level)
            bias = None if sigma is None else toeplitz_bias(toeplitz(frames, sigma)[None], frames, frames)[0]
            module.__class__ = ByPasses
            vars(module)["attend"] = without_waste(bias)
    return unet


def ops_at(spec: Spec, stage: str, frames: int, size: tuple[int, ...], dtype: torch.dtype) -> list[Op]:
    """Traces one forward of both guidance branches at one of STAGES."""
    with without_data(dtype):
        inputs = step_inputs(spec, size, frames, "cpu", dtype)
        return traced(network(spec, stage, frames), inputs if stage in (ENGINE, PRODUCTS) else batched(inputs))


def count(spec: Spec, frames: int, size: tuple[int, ...], dtype: torch.dtype, machine: Machine, rows: Rows) -> list[Row]:
    """Writes a row for each of STAGES and gives them; they are computed, not measured."""
    case = {"part": "fusion", "model": spec.name, "frames": frames, "size": "x".join(map(str, size))}
    most = {"flops_per_second": machine.flops, "bytes_per_second": machine.bandwidth}
    return [
        rows.write(Row(SUITE, case, stage, str(dtype)[6:], "computed", numbers=totals(found, machine), ceilings=most))
        for stage, found in ((stage, ops_at(spec, stage, frames, size, dtype)) for stage in STAGES)
    ]


def totals(ops: Sequence[Op], machine: Machine) -> dict[str, float]:
    """Adds up operators, FLOPs, bytes and floors."""
    flops, moved = (sum(getattr(op, name) for op in ops) for name in ("flops", "bytes"))
    return {"ops": len(ops), "flops": flops, "bytes": moved, "floor": sum(op.floor(machine) for op in ops)}
