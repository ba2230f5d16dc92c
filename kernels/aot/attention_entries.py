"""Temporal attention's Triton kernels as they are compiled ahead of time, and what in compiled code counts as a fault."""

import re
from dataclasses import dataclass
from typing import Any

from vstar_engine.kernels.gpu import temporal_attention as kernels
from vstar_engine.kernels.gpu.temporal_attention_launch import DTYPES, Config, configs, padded

POINTERS = ("q", "k", "v", "bias", "out")


@dataclass(frozen=True)
class Entry:
    """One kernel of the launch table as it is compiled: `even` has no masks, `dense` takes a matrix for a bias."""

    arch: int
    dtype: str
    head_dim: int
    config: Config
    even: bool
    dense: bool

    @property
    def name(self) -> str:
        form = f"sweep{self.config.rows}x{self.config.keys}" if self.config.sweep else f"tile{self.config.rows}"
        kind = "dense" if self.dense else "even" if self.even else "ragged"
        return f"temporal_attention_{form}_d{self.head_dim}_{self.dtype}_{kind}_sm{self.arch}"

    @property
    def kernel(self) -> Any:
        return kernels.kernel(self.config)

    @property
    def warps(self) -> int:
        return self.config.warps

    def argument(self, name: str) -> tuple[str, bool]:
        """Returns an argument's type, and whether it is known to be a multiple of 16."""
        if name in POINTERS:
            return "*fp32" if name == "bias" else f"*{self.dtype}", True
        return ("fp32" if name == "scale" else "i32"), False

    def constants(self) -> dict[str, Any]:
        """Returns the constexprs, for strides that are multiples of 16 bytes."""
        unit = 16 // DTYPES[self.dtype].bytes
        return kernels.constants(self.config, self.head_dim, unit, self.dense, self.even, widen=False)

    @property
    def tensor_core(self) -> str | None:
        """Names the tensor-core instruction that the kernel claims: None for IEEE float32."""
        if self.dtype == "fp32":
            return None
        large = self.config.rows >= 64 and self.config.warps >= 4
        return {90: "HGMMA", 100: r"UTC\w*MMA"}.get(self.arch, "HMMA") if large else "HMMA"

    def faults(self, record: dict[str, Any]) -> list[str]:
        """Returns a sentence for a missing tensor-core instruction and for tiles moved by less than 128 bits at a time."""
        config, found = self.config, []
        claimed = self.tensor_core
        if claimed and not any(re.fullmatch(claimed, name) for name in record["tensor_core"]):
            found.append(f"claims {claimed} but holds {record['tensor_core'] or 'no tensor-core instruction'}")
        if not self.dense:
            threads = 32 * config.warps
            row_bytes = padded(self.head_dim) * DTYPES[self.dtype].bytes
            # the bias comes as 32-bit words: its own tile, and for a sweep the scan of g for where it ends
            bias = -(-config.rows * config.keys // threads) + (-(-kernels.SCAN.value // threads) if config.sweep else 0)
            # a sweep loads keys in three places and values in two; its queries, once a program, may be too few for 128 bits
            tile = (5 * config.keys if config.sweep else config.rows + 2 * config.keys) * row_bytes
            others = record["loads_other"] if not config.sweep or config.rows * row_bytes >= 16 * threads else []
            if others or record["loads_32"] > bias or record["loads_128"] * 16 * threads < tile:
                loads = f"{record['loads_128']} of 128 bits, {record['loads_32']} of 32, others {record['loads_other']}"
                found.append(f"loads its tiles through less than 128 bits at a time: {loads}")
        made, at_once = config.rows * padded(self.head_dim) * DTYPES[self.dtype].bytes, 16 * 32 * config.warps
        # a tile too small for 128 bits a thread is stored by fewer
        if record["stores_128"] * at_once < made // at_once * at_once:
            stores = f"{record['stores_128']} of 128 bits, {record['stores_32']} of 32, others {record['stores_other']}"
            found.append(f"stores its tile through less than 128 bits at a time: {stores}")
        return found


def entries(archs: list[int], head_dims: list[int], dtypes: list[str]) -> list[Entry]:
    """Lists every kernel that the launch table can choose."""
    return [
        Entry(arch, dtype, head_dim, config, even, dense)
        for arch in archs
        for dtype in dtypes
        for head_dim in head_dims
        for config in configs(head_dim, dtype, arch)
        for even, dense in ((True, False), (False, False), (False, True))
        if not even or head_dim == padded(head_dim)
    ]
