"""How the Triton kernels of temporal attention are launched: the table chosen ahead of time, and the launch arithmetic.

Plain Python: nothing here needs a GPU or Triton. Up to 128 frames one tile may hold a whole (T, Tk) problem; more are swept.
The rows were chosen from compiled code (no spills, shared memory within limits, tensor cores where the dtype has them);
no row was timed on a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
HEAD_DIMS = (8, 16, 32, 40, 64, 80, 128)
TILES = (16, 32, 64, 128)
# bytes of shared memory that one program may have
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
GRID_LIMIT = 2**31 - 1
# the registers of the compiled kernels leave room for about this many warps on a multiprocessor
RESIDENT_WARPS = 16


class Dtype(NamedTuple):
    torch: str
    bytes: int


DTYPES = {"fp16": Dtype("float16", 2), "bf16": Dtype("bfloat16", 2), "fp32": Dtype("float32", 4)}


@dataclass(frozen=True)
class Config:
    """A row of the table: a tile of `rows` x `keys`, whole or swept over the keys, warps, and stages of the load pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int = 1
    sweep: bool = False


@dataclass(frozen=True)
class Launch:
    """Programs are numbered (((batch * groups + group) * heads + head) * blocks + block); each walks `run` positions."""

    config: Config
    even: bool
    run: int
    groups: int
    blocks: int
    programs: int


def padded(head_dim: int) -> int:
    """Rounds up to the power of two, at least 16, that tensor cores take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def nearest(arch: int) -> int:
    """Returns the newest architecture of the table that is no newer than `arch`."""
    if arch < ARCHITECTURES[0]:
        raise ValueError(f"the Triton kernels need compute capability {ARCHITECTURES[0] / 10} or newer, got {arch / 10}")
    return max(known for known in ARCHITECTURES if known <= arch)


Rows = dict[int, Config]


def _swept(rows: Rows, *tiles: int) -> Rows:
    return {**rows, **dict.fromkeys(tiles, rows[0])}


# frames -> row; row 0 serves every longer problem
_HALF: Rows = {
    16: Config(16, 16, warps=1),
    32: Config(32, 32, warps=2),
    64: Config(64, 64, warps=4, stages=2),
    128: Config(128, 128, warps=8, stages=2),
    0: Config(64, 64, warps=4, sweep=True),
}
# a single warp and stage leave registers enough here; wgmma and tcgen05 want 64 rows to a group of four warps
_HALF_90 = {**_HALF, 32: Config(32, 32, warps=1), 64: Config(64, 64, warps=4), 0: Config(128, 64, warps=8, sweep=True)}
# two stages double the loop's code on sm_100, where the pipeline covers the tensor cores too
_HALF_100 = {**_HALF_90, 128: Config(128, 128, warps=8)}
_HALF_120 = {**_HALF, 32: Config(32, 32, warps=1), 0: Config(64, 32, warps=4, sweep=True)}
_HALF_BY_ARCH = {80: _HALF, 86: _HALF, 89: _HALF, 90: _HALF_90, 100: _HALF_100, 120: _HALF_120}
# of narrow heads the larger sweeps spill, or have too few bytes for 128 bits a thread
_NARROW_SWEEP = {16: Config(32, 64, warps=4, sweep=True), 32: Config(64, 32, warps=4, sweep=True)}
_WIDE_HALF: Rows = {
    16: Config(16, 16, warps=2),
    32: Config(32, 32, warps=4),
    64: Config(64, 64, warps=8),
    0: Config(64, 32, warps=8, sweep=True),
}
_WIDE_HALF_90 = {**_WIDE_HALF, 64: Config(64, 64, warps=4)}
_SINGLE: dict[int, Rows] = {
    16: {
        16: Config(16, 16, warps=2),
        32: Config(32, 32, warps=4),
        64: Config(64, 64, warps=8),
        0: Config(16, 32, warps=4, sweep=True),
    },
    64: {
        16: Config(16, 16, warps=4),
        32: Config(32, 32, warps=4),
        64: Config(64, 64, warps=16),
        0: Config(32, 32, warps=8, sweep=True),
    },
    128: {
        16: Config(16, 16, warps=4),
        32: Config(32, 32, warps=8),
        0: Config(32, 16, warps=8, sweep=True),
    },
}
_SINGLE[32] = _SINGLE[64]


def _rows(head_dim: int, dtype: str, arch: int) -> Rows:
    width = padded(head_dim)
    if DTYPES[dtype].bytes == 4:
        # the largest tiles spill where a program of many warps has the fewest registers
        largest = {64: 64, 128: 32}.get(width, 128) if arch in (86, 89) else 128
        return _swept(_SINGLE[width], *(tile for tile in TILES if tile >= largest or tile not in _SINGLE[width]))
    if width == 128:
        return _swept(_WIDE_HALF_90 if arch in (90, 100) else _WIDE_HALF, 128)
    rows = {**_HALF_BY_ARCH[arch], **({0: _NARROW_SWEEP[width]} if width in _NARROW_SWEEP else {})}
    if arch == 80 and width == 64 and head_dim < width:
        # the masks of a padded head make the sweep over 64 keys spill
        rows = {**rows, 0: Config(64, 32, warps=4, sweep=True)}
    # a whole tile of 128 frames spills on sm_120
    return _swept(rows, 128) if arch == 120 else rows


def configs(head_dim: int, dtype: str, arch: int) -> Iterator[Config]:
    """Returns each row that `plan` can choose, once."""
    yield from dict.fromkeys(_rows(head_dim, dtype, arch).values())


def config(frames: int, keys: int, head_dim: int, dtype: str, arch: int) -> Config:
    """Chooses the row for a problem of `frames` queries and `keys` keys on an architecture of any number from 80 up."""
    tile = next((tile for tile in TILES if max(frames, keys) <= tile), 0)
    return _rows(head_dim, dtype, nearest(arch))[tile]


def plan(shape: tuple[int, ...], keys: int, row: Config, multiprocessors: int, masked: bool) -> Launch:
    """Lays the programs of a row over q's shape (B, T, P, heads, head_dim), long enough to reuse the bias tile.

    Raises ValueError when there are more than a grid holds: 2^31 programs are a terabyte of q.
    """
    batch, frames, positions, heads, head_dim = shape
    fits = frames == keys and head_dim == padded(head_dim) and frames % row.rows == 0 and frames % row.keys == 0
    if row.sweep:
        run, blocks = 1, -(-frames // row.rows)
    else:
        # twice the programs that a device holds at once, so that the last ones leave no gap
        wanted = 2 * multiprocessors * max(1, RESIDENT_WARPS // row.warps)
        run, blocks = next((run for run in (8, 4, 2) if batch * heads * -(-positions // run) >= wanted), 1), 1
    groups = -(-positions // run)
    programs = batch * heads * groups * blocks
    if programs > GRID_LIMIT:
        raise ValueError(f"batch x positions x heads needs {programs} programs, and a grid holds at most {GRID_LIMIT}")
    return Launch(row, fits and not masked, run, groups, blocks, programs)
