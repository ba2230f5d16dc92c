"""The launch table and the launch arithmetic of temporal attention, exhaustively."""

from itertools import product

import pytest

pytest.importorskip("triton", reason="needs Triton")
import numpy as np

from vstar_engine.kernels.gpu.temporal_attention import _program
from vstar_engine.kernels.gpu.temporal_attention_launch import (
    ARCHITECTURES,
    DTYPES,
    GRID_LIMIT,
    HEAD_DIMS,
    Config,
    config,
    configs,
    padded,
    plan,
)

TILE, SWEEP = Config(16, 16, warps=1), Config(32, 16, warps=4, sweep=True)


@pytest.mark.parametrize("multiprocessors", [0, 1, 132])
@pytest.mark.parametrize(
    ("row", "frames"), [(TILE, 7), (SWEEP, 16), (SWEEP, 32), (SWEEP, 100)], ids=["tile", "1", "1-even", "4"]
)
def test_each_launch_covers_every_row_once(row, frames, multiprocessors):
    for batch, positions, heads in product((1, 2, 3), range(1, 67), (1, 2, 5)):
        launch = plan((batch, frames, positions, heads, 16), frames, row, multiprocessors, masked=False)
        block, head, group, item = _program.fn(np.arange(launch.programs), launch.blocks, heads, launch.groups)
        written = np.zeros((batch, launch.groups * launch.run, heads, launch.blocks), np.int64)
        for step in range(launch.run):
            inside = group * launch.run + step < positions
            np.add.at(written, (item[inside], (group * launch.run + step)[inside], head[inside], block[inside]), 1)
        assert (written[:, :positions] == 1).all()
        assert written.sum() == batch * positions * heads * launch.blocks
        # blocks of rows tile the frames without a gap or an empty block
        rows = frames if not row.sweep else row.rows
        assert (launch.blocks - 1) * rows < frames <= launch.blocks * rows


def test_the_table_serves_every_problem():
    for arch, dtype, head_dim in product(ARCHITECTURES, DTYPES, (*HEAD_DIMS, 1, 24, 96, 127)):
        known = set(configs(head_dim, dtype, arch))
        for frames, keys in product((1, 2, 16, 17, 64, 65, 128, 129, 4096), repeat=2):
            row = config(frames, keys, head_dim, dtype, arch)
            assert row in known
            assert row.sweep or max(frames, keys) <= row.rows == row.keys


@pytest.mark.parametrize(("arch", "serves"), [(80, 80), (87, 86), (89, 89), (103, 100), (110, 100), (121, 120), (130, 120)])
def test_an_unknown_architecture_takes_the_nearest_older_row(arch, serves):
    assert config(64, 64, 64, "fp16", arch) == config(64, 64, 64, "fp16", serves)


def test_an_architecture_before_ampere_is_refused():
    with pytest.raises(ValueError, match=r"compute capability 8\.0 or newer, got 7\.5"):
        config(64, 64, 64, "fp16", 75)


# (B, T, P, heads, head_dim) of q that fill the memory of the largest GPUs: 140 GB of q, k, v and the output in half precision
GIANTS = [
    (1, 1, 2**31 // 2, 2, 8),
    (70000, 1, 31000, 1, 8),
    (1, 4096, 2**20, 4, 8),
    (2**31 // 64, 17, 1, 1, 32),
    (3, 129, 2**20, 10, 64),
]


@pytest.mark.parametrize("shape", GIANTS, ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_grids_and_numbers_stay_within_32_bits(shape, arch):
    batch, frames, positions, heads, head_dim = shape
    row = config(frames, frames, head_dim, "fp16", arch)
    launch = plan(shape, frames, row, 132, masked=False)
    assert launch.programs <= GRID_LIMIT
    last = _program.fn(launch.programs - 1, launch.blocks, heads, launch.groups)
    assert last == (launch.blocks - 1, heads - 1, launch.groups - 1, batch - 1)
    # row numbers are 32-bit, every product with a stride 64-bit
    assert launch.blocks * row.rows + row.keys < 2**31
    assert batch * frames * positions * heads * padded(head_dim) < 2**63


def test_more_programs_than_a_grid_holds_are_refused():
    with pytest.raises(ValueError, match="a grid holds at most 2147483647"):
        plan((2**20, 4096, 2**20, 1, 64), 4096, SWEEP, 132, masked=False)
