"""The temporal-attention kernel as TensorRT plugins carry it, compiled ahead of time without a GPU.

q, k, v and out are contiguous (B, T, P, heads, head_dim), g is (1 or B, T); parameters stand in the order in which TensorRT
passes them: inputs, integers, outputs. TensorRT may keep one kernel for all frame counts of an engine, so every tactic is
right at any: it takes the tile where the frames fit it and sweeps where they do not, on a grid that `programs` lays out.
"""

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vstar_engine.kernels.gpu.temporal_attention import LOG2E, sweep_kernel, tile_kernel
from vstar_engine.kernels.gpu.temporal_attention_launch import DTYPES, SHARED_LIMIT, Config, configs, nearest, padded

POINTERS = ("q", "k", "v", "g", "out")
INTEGERS = ("T", "P", "heads", "run", "g_step")
# positions that a program of the tile walks: few where the grid is small, many where it is large; the builder times both
RUNS = (2, 8)
# a program may have this much shared memory without the launcher asking for more
SHARED_WITHOUT_ASKING = 48 * 1024


@triton.jit(do_not_specialize=INTEGERS)
def plugin_kernel(
    q, k, v, g, T, P, heads, run, g_step, out,
    SCALE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr,
    N: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Computes a tile where T <= N, else sweeps; N = 0 always sweeps. Strides are in units of UNIT elements."""
    head_step = D // UNIT
    position_step = heads * head_step
    frame_step = P * position_step
    # in units of 16 bytes: 2^31 of them are 32 GiB for a batch item
    batch_step = T * frame_step
    if T <= N:
        tile_kernel(
            q, k, v, g, out, T, T, P, heads, tl.cdiv(P, run), run, SCALE,
            batch_step, frame_step, position_step, head_step, batch_step, frame_step, position_step, head_step,
            batch_step, frame_step, position_step, head_step, batch_step, frame_step, position_step, head_step,
            g_step, 0, 0, max(N, 16), D, BD, UNIT, False, False, STAGES, False,
        )  # fmt: skip
    else:
        sweep_kernel(
            q, k, v, g, out, T, T, P, heads, P, 1, SCALE,
            batch_step, frame_step, position_step, head_step, batch_step, frame_step, position_step, head_step,
            batch_step, frame_step, position_step, head_step, batch_step, frame_step, position_step, head_step,
            g_step, 0, 0, ROWS, KEYS, D, BD, UNIT, False, False, 1, False,
        )  # fmt: skip


@dataclass(frozen=True)
class Tactic:
    """A launch of the layer: a tile up to `frames` (0: none), a sweep beyond, and the positions of a tile's program."""

    frames: int
    stages: int
    sweep: Config
    run: int

    def programs(self, batch: Any, frames: Any, positions: Any, heads: Any, cdiv: Any, less: Any) -> Any:
        """Counts the programs of a launch; the operands are integers, or TensorRT's expressions over a tensor's dimensions."""
        swept = cdiv(frames, self.sweep.rows) * positions
        if self.frames == 0:
            return swept * heads * batch
        tiled = cdiv(positions, self.run)
        return (tiled + less(self.frames, frames) * (swept - tiled)) * heads * batch


def _tail(row: Config, swept: Config) -> Config:
    """Returns the sweep for a kernel with `row`'s warps: the table's, or the smallest where these are too few for it."""
    if row.warps >= swept.warps:
        return replace(swept, warps=row.warps)
    return Config(16, 16, row.warps, sweep=True)


@cache
def tactics(head_dim: int, dtype: str, arch: int) -> tuple[Tactic, ...]:
    """Lists the tactics for a layer, from the launch table; TensorRT numbers them from 1."""
    rows = list(configs(head_dim, dtype, nearest(arch)))
    (swept,) = [row for row in rows if row.sweep]
    if (swept.rows, swept.keys, swept.warps) == (64, 64, 4):
        # beside the plugin's own arithmetic the larger one spills
        swept = replace(swept, keys=32)
    # a tile of 32 frames spills, beside a sweep, in a single warp
    tiled = [replace(row, warps=max(row.warps, 2)) if row.rows > 16 else row for row in rows if not row.sweep]
    tiles = [Tactic(row.rows, row.stages, _tail(row, swept), run) for row in tiled for run in RUNS]
    return (*tiles, Tactic(0, 1, swept, 1))


@dataclass(frozen=True)
class Compiled:
    """A tactic's kernel for one architecture. `hidden` counts the null pointers that a cubin's launch adds after `out`."""

    entry_point: str
    ptx: str
    cubin: bytes
    warps: int
    shared: int
    hidden: int

    @property
    def threads(self) -> int:
        return 32 * self.warps


def strip_hidden(ptx: str, keep: int) -> str:
    """Removes the parameters after the first `keep` from a kernel's entry: the compiler's own, for scratch memory."""
    found = re.search(r"(\.entry\s+\w+\()([^)]*)(\))", ptx)
    if found is None:
        raise ValueError("the PTX has no entry point")
    parameters = [line.strip().rstrip(",") for line in found[2].strip().splitlines()]
    rest = ptx[: found.start()] + ptx[found.end() :]
    used = [name for name in (line.split()[-1] for line in parameters[keep:]) if re.search(rf"\b{re.escape(name)}\b", rest)]
    if used or len(parameters) < keep:
        raise ValueError(f"the kernel must have {keep} parameters and use no other, got {len(parameters)} and {used} in use")
    kept = ",\n\t".join(parameters[:keep])
    return f"{ptx[: found.start()]}{found[1]}\n\t{kept}\n{found[3]}{ptx[found.end() :]}"


@cache
def compile_tactic(tactic: Tactic, head_dim: int, dtype: str, arch: int) -> Compiled:
    """Compiles a tactic for one of the table's architectures; ValueError when it needs what a plugin cannot give.

    16-byte alignment is taken for granted of q, k, v and out, whose views begin at whole heads, and not of g.
    """
    size = DTYPES[dtype].bytes
    if head_dim * size % 16:
        raise ValueError(f"the plugin needs heads of a multiple of 16 bytes, got {head_dim} x {size}")
    values = {
        "SCALE": head_dim**-0.5 * LOG2E,
        "D": head_dim,
        "BD": padded(head_dim),
        "UNIT": 16 // size,
        "N": tactic.frames,
        "STAGES": tactic.stages,
        "ROWS": tactic.sweep.rows,
        "KEYS": tactic.sweep.keys,
    }
    kinds = {"g": "*fp32", **dict.fromkeys(INTEGERS, "i32"), **dict.fromkeys(values, "constexpr")}
    names = plugin_kernel.arg_names
    source = ASTSource(
        fn=plugin_kernel,
        signature={name: kinds.get(name, f"*{dtype}") for name in names},
        constexprs={(names.index(name),): value for name, value in values.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in POINTERS if name != "g"},
    )
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": tactic.sweep.warps})
    metadata, ptx = built.metadata, built.asm["ptx"]
    scratch = metadata.global_scratch_size + metadata.profile_scratch_size
    if scratch or metadata.shared > SHARED_LIMIT[arch]:
        raise ValueError(f"the kernel needs {scratch} bytes of scratch and {metadata.shared} of shared memory on sm_{arch}")
    keep = len(POINTERS) + len(INTEGERS)
    stripped = strip_hidden(ptx, keep)
    hidden = ptx.count(".param .") - stripped.count(".param .")
    return Compiled(metadata.name, stripped, built.asm["cubin"], metadata.num_warps, metadata.shared, hidden)
