"""The fused ops' Triton kernels as they are compiled ahead of time, and what in compiled code counts as a fault."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vstar_engine.kernels.gpu import (
    fp8_conv2d,
    fp8_layernorm,
    fp8_linear,
    fp8_quantize,
    geglu,
    groupnorm_silu,
    guided_step,
    linear,
)
from vstar_engine.kernels.gpu.temporal_attention_launch import DTYPES
from vstar_engine.kernels.guided_step import COEFFICIENTS

KERNELS = {
    "geglu": geglu.geglu_kernel,
    "to_e4m3": fp8_quantize.to_e4m3_kernel,
    "conv_e4m3": fp8_conv2d.conv_e4m3_kernel,
    "norm_e4m3": fp8_layernorm.norm_e4m3_kernel,
    "linear_e4m3": fp8_linear.linear_e4m3_kernel,
    "groupnorm_silu_measure": groupnorm_silu.measure_kernel,
    "groupnorm_silu_settle": groupnorm_silu.settle_kernel,
    "groupnorm_silu_normalise": groupnorm_silu.normalise_kernel,
    "guided_step": guided_step.guided_step_kernel,
    "linear": linear.linear_kernel,
    "linear_moments": linear.moments_kernel,
}
# feed-forwards' inner widths and norms' channels of VideoCrafter2's UNet, then its decoder's, in 32 groups; multiples of 16 all
INNER = (1280, 2048, 2560, 5120)
CHANNELS = (320, 640, 960, 1280, 1920, 2560, 128, 256, 512)
GROUPS = 32
# channels that the UNet's convolutions take in, but for the first one's four
CONVOLVED = (320, 640, 960, 1280, 1920, 2560)
TENSORS = ("x", "out", "weight", "bias", "residual", "gain", "shift", "predicted")
# float32 whatever the network's dtype: statistics, and of a sampling step all but the predictions
WIDE_TENSORS = (
    *("moments", "settled", "step", "scale", "then"),
    *("latents", "noise", "coefficients", "history", "after", "clean"),
)
# clean latents of earlier steps that a multistep solver reads
HISTORY = 2
# widths of its transformers
WIDTHS = (320, 512, 640, 1280)
# what a linear layer of it that Triton may compute has around its product: norm, bias, residual, gate
AROUND = {
    "norm": (True, False, False, False),
    "bias_residual": (False, True, True, False),
    "norm_bias_gate": (True, True, False, True),
}
# and in FP8, where norms round: rounding, bias, residual, gate, and rounding for the next layer
AROUND_E4M3 = {
    "round_bias": (True, True, False, False, False),
    "round_bias_residual": (True, True, True, False, False),
    "bias_gate_then": (False, True, False, True, True),
    "bias_residual": (False, True, True, False, False),
}
WIDE = ("inner", "channels", "count", "in_features", "out_features", "in_channels", "out_channels")
# the first architecture that has e4m3, the ops that want it, and their tensors of it
E4M3_SINCE = 89
E4M3 = {"to_e4m3": ("out",), "norm_e4m3": ("out",), "conv_e4m3": ("x", "weight"), "linear_e4m3": ("x", "weight")}


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

    def small(self, name: str) -> bool:
        """Returns whether a tensor is in e4m3."""
        values = self.constants()
        if name == "x" and values.get("ROUND"):
            return False
        return name in E4M3.get(self.op, ()) or (name == "out" and values.get("THEN", False))

    def argument(self, name: str) -> tuple[str, bool]:
        """Returns an argument's type, and whether it is known to be a multiple of 16."""
        if self.small(name):
            return "*fp8e4nv", True
        if name in TENSORS:
            return f"*{self.dtype}", True
        if name in WIDE_TENSORS:
            return "*fp32", True
        if name == "plain":
            return "*i64", True
        return ("fp32" if name == "eps" else "i32"), name in WIDE

    @property
    def tensor_core(self) -> str | None:
        """Names the tensor-core instruction that the kernel claims, if it makes products."""
        if self.op in ("conv_e4m3", "linear_e4m3"):
            return {90: "QGMMA", 100: "UTCQMMA"}.get(self.arch, "QMMA")
        return {90: "HGMMA", 100: r"UTC\w*MMA"}.get(self.arch, "HMMA") if self.op == "linear" else None

    def sweeps(self) -> tuple[int, int]:
        """Returns the least elements that a program loads and stores, without statistics, which are too few to matter."""
        sizes = self.constants()
        if self.op == "linear":
            tile = sizes["M"] * sizes["N"]
            part = (sizes["M"] + sizes["N"] * (2 if sizes["GATE"] else 1)) * sizes["K"]
            return part + (tile if sizes["RESIDUAL"] else 0), tile
        if self.op == "conv_e4m3":
            return (sizes["M"] + sizes["N"]) * sizes["K"], sizes["M"] * sizes["N"]
        if self.op == "linear_e4m3":
            # counted as values of x: half precision where they are rounded here, and so is the residual; weights are bytes
            tile, width = sizes["M"] * sizes["N"], 2 if sizes["ROUND"] else 1
            weights = sizes["N"] * sizes["K"] * (2 if sizes["GATE"] else 1)
            return sizes["M"] * sizes["K"] + (weights + (2 * tile if sizes["RESIDUAL"] else 0)) // width, tile
        block, tile = sizes.get("BLOCK", 0), sizes.get("R", 0) * sizes.get("C", 0)
        # a float32 value counts as so many of the predictions
        wide = 4 // DTYPES[self.dtype].bytes
        return {
            "guided_step": (2 * block + block * wide * (2 + sizes.get("DEPTH", 0)), 2 * block * wide),
            "geglu": (2 * block, block),
            "to_e4m3": (block, block),
            "groupnorm_silu_measure": (tile, 0),
            "groupnorm_silu_normalise": (tile, tile),
            "linear_moments": (sizes.get("R", 0) * sizes.get("PADDED", 0), 0),
            "norm_e4m3": (sizes.get("R", 0) * sizes.get("PADDED", 0),) * 2,
        }.get(self.op, (0, 0))

    def faults(self, record: dict[str, Any]) -> list[str]:
        """Returns a sentence for each sweep of less than 128 bits at a time and for a missing tensor-core instruction."""
        found = []
        taken, made = (1 if self.small(name) else DTYPES[self.dtype].bytes for name in ("x", "out"))
        for word, kind, elements, size in zip(
            ("loads x", "stores"), ("loads", "stores"), self.sweeps(), (taken, made), strict=True
        ):
            if record[f"{kind}_128"] * 16 * 32 * self.warps < elements * size:
                widths = f"{record[f'{kind}_128']} of 128 bits, {record[f'{kind}_32']} of 32, others {record[f'{kind}_other']}"
                found.append(f"{word} through less than 128 bits at a time: {widths}")
        if self.tensor_core and not any(re.fullmatch(self.tensor_core, name) for name in record["tensor_core"]):
            found.append(f"claims {self.tensor_core} but holds {record['tensor_core'] or 'no tensor-core instruction'}")
        return found


def _products(arch: int) -> Iterator[tuple[str, tuple[tuple[str, Any], ...], int, str]]:
    """Returns op, constants, warps and case of every product that VideoCrafter2's transformers take."""
    for case, around in AROUND.items():
        absent = {
            name: None
            for name, there in zip(("moments gain shift", "bias", "residual"), around, strict=False)
            for name in name.split()
            if not there
        }
        for tile in linear.tiles(arch, gate=around[3]):
            # every width is a multiple of every depth
            values = {**absent, **linear.constants(tile, WIDTHS[0], *around, widen=False)}
            yield "linear", tuple(values.items()), tile.warps, f"{tile.rows}x{tile.columns}_{case}"


def _convolutions(arch: int) -> Iterator[tuple[str, tuple[tuple[str, Any], ...], int, str]]:
    """Returns the same for FP8 convolutions; one kernel serves those over images and over frames."""
    for tile in fp8_conv2d.tiles(arch) if arch >= E4M3_SINCE else ():
        for values in sorted({tuple(fp8_conv2d.constants(tile, in_channels).items()) for in_channels in CONVOLVED}):
            name = f"{tile.rows}x{tile.columns}x{tile.depth}" + ("" if dict(values)["EVEN"] else "_ragged")
            yield "conv_e4m3", values, tile.warps, name


def _small_products(arch: int) -> Iterator[tuple[str, tuple[tuple[str, Any], ...], int, str]]:
    """Returns the same for FP8 linear layers with more than a bias around them."""
    for case, around in AROUND_E4M3.items() if arch >= E4M3_SINCE else ():
        bias, residual, gate, then = around[1:]
        absent = {name: None for name, there in (("bias", bias), ("residual", residual), ("then", then)) if not there}
        for tile in fp8_linear.tiles(arch, residual, gate):
            widths = WIDTHS if gate or around[0] else INNER
            for values in sorted({tuple(fp8_linear.constants(tile, in_features, *around).items()) for in_features in widths}):
                name = f"{tile.rows}x{tile.columns}x{tile.depth}_{case}" + ("" if dict(values)["EVEN"] else "_ragged")
                yield "linear_e4m3", (*absent.items(), *values), tile.warps, name


def fused_entries(archs: list[int], dtypes: list[str]) -> list[FusedEntry]:
    """Lists every fused kernel that VideoCrafter2's sizes take."""
    gates = {tuple(geglu.constants(inner).items()) for inner in INNER}
    settle = {tuple(groupnorm_silu.settle_constants(channels, GROUPS).items()) for channels in CHANNELS}
    moments = {tuple(linear.moments_constants(width).items()) for width in WIDTHS}
    tile = (("R", groupnorm_silu.ROWS), ("C", groupnorm_silu.CHANNELS))
    wide = groupnorm_silu.WARPS
    guided = {
        case: (*absent, ("BLOCK", guided_step.BLOCK), ("WIDTH", len(COEFFICIENTS) + depth), ("DEPTH", depth))
        for case, absent, depth in (("block", (("history", None),), 0), ("history", (), HISTORY))
    }
    kinds = [
        *(("geglu", values, geglu.warps(dict(values)["BLOCK"]), f"block{dict(values)['BLOCK']}") for values in sorted(gates)),
        ("to_e4m3", (("BLOCK", fp8_quantize.BLOCK),), fp8_quantize.WARPS, "block"),
        *(("guided_step", values, guided_step.WARPS, case) for case, values in guided.items()),
        ("groupnorm_silu_measure", tile, wide, "tile"),
        *(("groupnorm_silu_settle", values, 4, f"size{dict(values)['SIZE']}") for values in sorted(settle)),
        *(("groupnorm_silu_normalise", (*tile, ("SILU", on)), wide, "silu" if on else "plain") for on in (True, False)),
    ]
    rows, small_rows = (
        [(op, values, linear.MOMENTS_WARPS, f"rows{dict(values)['R']}x{dict(values)['PADDED']}") for values in sorted(moments)]
        for op in ("linear_moments", "norm_e4m3")
    )
    return [
        FusedEntry(op, arch, dtype, values, warps, case)
        for arch in archs
        for dtype in dtypes
        # products in float32 are PyTorch's
        for op, values, warps, case in [
            *(*kinds, *_convolutions(arch)),
            *small_rows,
            *([*rows, *_products(arch), *_small_products(arch)] if DTYPES[dtype].bytes == 2 else []),
        ]
        if op not in E4M3 or arch >= E4M3_SINCE
    ]
