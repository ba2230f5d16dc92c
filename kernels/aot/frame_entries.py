"""The Triton kernel of frame attention as it is compiled ahead of time, and what in compiled code counts as a fault."""

import re
from dataclasses import dataclass
from typing import Any

from vstar_engine.kernels.gpu.frame_attention import REGISTERS, FrameConfig, frame_config, frame_constants, frame_kernel
from vstar_engine.kernels.gpu.temporal_attention_launch import DTYPES, padded

# of Wan
HEAD_DIM = 128
# the rules that the dials make: which of a, g, b and decay they use
RULES = {
    "bias": (False, False, True, False),
    "rowmax": (False, True, False, False),
    "decay": (False, False, True, True),
}


@dataclass(frozen=True)
class FrameEntry:
    """One kernel as it is compiled, for tokens that fill no tile; `case` names what its constants depend on."""

    op: str
    arch: int
    dtype: str
    head_dim: int
    rule: str
    case: str

    @property
    def config(self) -> FrameConfig:
        return frame_config(self.head_dim, self.dtype, self.arch)

    @property
    def name(self) -> str:
        return f"{self.op}_{self.case}_{self.dtype}_sm{self.arch}"

    @property
    def kernel(self) -> Any:
        return frame_kernel

    @property
    def warps(self) -> int:
        return self.config.warps

    @property
    def registers(self) -> int:
        return REGISTERS

    def argument(self, name: str) -> tuple[str, bool]:
        """Returns an argument's type, and whether it is known to be a multiple of 16."""
        if name in ("q", "k", "v", "out"):
            return f"*{self.dtype}", True
        if name in ("a", "g", "b"):
            # a table that the rule does not use is a tensor of the others' dtype
            used = dict(zip(("a", "g", "b"), RULES[self.rule], strict=False))[name]
            return "*fp32" if used else f"*{self.dtype}", True
        return ("fp32" if name in ("scale", "decay") else "i32"), False

    def constants(self) -> dict[str, Any]:
        """Returns the constexprs, for strides that are multiples of 16 bytes."""
        unit = 16 // DTYPES[self.dtype].bytes
        return frame_constants(self.config, self.head_dim, unit, RULES[self.rule], even=False, widen=False)

    @property
    def tensor_core(self) -> str | None:
        """Names the tensor-core instruction that the kernel claims: None for IEEE float32."""
        if self.dtype == "fp32":
            return None
        return {90: "HGMMA", 100: r"UTC\w*MMA"}.get(self.arch, "HMMA")

    def faults(self, record: dict[str, Any]) -> list[str]:
        """Returns a sentence for a missing tensor-core instruction and for tiles moved by less than 128 bits at a time."""
        found = []
        if self.tensor_core and not any(re.fullmatch(self.tensor_core, name) for name in record["tensor_core"]):
            found.append(f"claims {self.tensor_core} but holds {record['tensor_core'] or 'no tensor-core instruction'}")
        row_bytes = padded(self.head_dim) * DTYPES[self.dtype].bytes
        at_once = 16 * 32 * self.warps
        for kind, rows in (("loads", self.config.rows + 2 * self.config.keys), ("stores", self.config.rows)):
            if record[f"{kind}_128"] * at_once < rows * row_bytes // at_once * at_once:
                widths = f"{record[f'{kind}_128']} of 128 bits, {record[f'{kind}_32']} of 32, others {record[f'{kind}_other']}"
                found.append(f"{kind} its tiles through less than 128 bits at a time: {widths}")
        return found


def frame_entries(archs: list[int], dtypes: list[str]) -> list[FrameEntry]:
    """Lists the kernels of the rules that the dials make."""
    found = []
    for arch in archs:
        for dtype in dtypes:
            row = frame_config(HEAD_DIM, dtype, arch)
            for rule in RULES:
                case = f"{rule}_d{HEAD_DIM}_{row.rows}x{row.keys}"
                found.append(FrameEntry("frame_attention", arch, dtype, HEAD_DIM, rule, case))
    return found
