"""What of the fused ops' Triton kernels is compiled ahead of time, and how compiled code shows that it would run badly."""

from dataclasses import dataclass
from typing import Any

from . import e4m3_triton, geglu_triton, groupnorm_silu_triton, guided_step_triton
from .guided_step import COEFFICIENTS
from .temporal_attention_launch import DTYPES

KERNELS = {
    "geglu": geglu_triton.geglu_kernel,
    "to_e4m3": e4m3_triton.to_e4m3_kernel,
    "groupnorm_silu_measure": groupnorm_silu_triton.measure_kernel,
    "groupnorm_silu_settle": groupnorm_silu_triton.settle_kernel,
    "groupnorm_silu_normalise": groupnorm_silu_triton.normalise_kernel,
    "guided_step": guided_step_triton.guided_step_kernel,
}
# feed-forwards' inner widths and norms' channels of VideoCrafter2, in its 32 groups; multiples of 16 all of them
INNER = (1280, 2048, 2560, 5120)
CHANNELS = (320, 640, 960, 1280, 1920, 2560)
GROUPS = 32
TENSORS = ("x", "out", "weight", "bias", "predicted")
# float32 whatever the network's dtype: statistics, and of a sampling step all but the predictions
WIDE_TENSORS = ("moments", "settled", "step", "latents", "noise", "coefficients", "after", "clean")
WIDE = ("inner", "channels", "count")
# the first architecture that has e4m3
E4M3_SINCE = 89


@dataclass(frozen=True)
class FusedEntry:
    """One kernel as it is compiled; `case` names what its constants depend on."""

    op: str
    arch: int
    dtype: str
    values: tuple[tuple[str, Any], ...]
    warps: int
    case: str

    @property
    def name(self) -> str:
        return f"{self.op}_{self.case}_{self.dtype}_sm{self.arch}"

    @property
    def kernel(self) -> Any:
        return KERNELS[self.op]

    def constants(self) -> dict[str, Any]:
        return dict(self.values)

    def argument(self, name: str) -> tuple[str, bool]:
        """Gives an argument's type, and whether it is known to be a multiple of 16."""
        if self.op == "to_e4m3" and name == "out":
            return "*fp8e4nv", True
        if name in TENSORS:
            return f"*{self.dtype}", True
        if name in WIDE_TENSORS:
            return "*fp32", True
        if name == "plain":
            return "*i64", True
        return ("fp32" if name == "eps" else "i32"), name in WIDE

    def faults(self, record: dict[str, Any]) -> list[str]:
        """Holds the sweeps over x to accesses of 128 bits; statistics are too few to matter."""
        element = DTYPES[self.dtype].bytes
        sizes = self.constants()
        block, tile = sizes.get("BLOCK", 0), sizes.get("R", 0) * sizes.get("C", 0)
        wanted = {
            "geglu": 2 * block * element,
            "to_e4m3": block * element,
            "guided_step": 2 * block * element + 2 * block * 4,
            "groupnorm_silu_measure": tile * element,
            "groupnorm_silu_normalise": tile * element,
        }.get(self.op, 0)
        if record["loads_128"] * 16 * 32 * self.warps >= wanted:
            return []
        loads = f"{record['loads_128']} of 128 bits, {record['loads_32']} of 32, others {record['loads_other']}"
        return [f"loads x through less than 128 bits at a time: {loads}"]


def fused_entries(archs: list[int], dtypes: list[str]) -> list[FusedEntry]:
    """Lists every fused kernel that VideoCrafter2's sizes take."""
    geglu = {tuple(geglu_triton.constants(inner).items()) for inner in INNER}
    settle = {tuple(groupnorm_silu_triton.settle_constants(channels, GROUPS).items()) for channels in CHANNELS}
    tile = (("R", groupnorm_silu_triton.ROWS), ("C", groupnorm_silu_triton.CHANNELS))
    wide = groupnorm_silu_triton.WARPS
    guided = (("BLOCK", guided_step_triton.BLOCK), ("WIDTH", len(COEFFICIENTS)))
    kinds = [
        *(
            ("geglu", values, geglu_triton.warps(dict(values)["BLOCK"]), f"block{dict(values)['BLOCK']}")
            for values in sorted(geglu)
        ),
        ("to_e4m3", (("BLOCK", e4m3_triton.BLOCK),), e4m3_triton.WARPS, "block"),
        ("guided_step", guided, guided_step_triton.WARPS, "block"),
        ("groupnorm_silu_measure", tile, wide, "tile"),
        *(("groupnorm_silu_settle", values, 4, f"size{dict(values)['SIZE']}") for values in sorted(settle)),
        *(("groupnorm_silu_normalise", (*tile, ("SILU", on)), wide, "silu" if on else "plain") for on in (True, False)),
    ]
    return [
        FusedEntry(op, arch, dtype, values, warps, case)
        for arch in archs
        for dtype in dtypes
        for op, values, warps, case in kinds
        if op != "to_e4m3" or arch >= E4M3_SINCE
    ]
