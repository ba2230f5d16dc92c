"""The TensorRT plugins' kernel, compiled for every architecture without spills, and its tactics."""

from itertools import product

import pytest

pytest.importorskip("triton", reason="needs Triton")

from vstar_engine.kernels.aot.cubin import inspect_cubin
from vstar_engine.kernels.gpu.temporal_attention_launch import ARCHITECTURES, DTYPES, SHARED_LIMIT
from vstar_engine.kernels.tensorrt.tactics import RUNS, Tactic, compile_tactic, tactics

# head widths of the published UNet and of the mini one
SHIPPED = [(arch, dtype, head_dim) for arch, dtype, head_dim in product(ARCHITECTURES, DTYPES, (16, 64))]
IN_CI = [(arch, "fp16", 64) for arch in (80, 90)]


@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim"),
    [*IN_CI, *(pytest.param(*case, marks=pytest.mark.slow) for case in SHIPPED if case not in IN_CI)],
)
def test_no_tactic_spills(arch, dtype, head_dim, tmp_path):
    for tactic in tactics(head_dim, dtype, arch):
        kernel = compile_tactic(tactic, head_dim, dtype, arch)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(kernel.cubin)
        found = inspect_cubin(cubin)
        assert (found["spills"], found["stack"], found["local"]) == (0, 0, 0), tactic
        assert kernel.shared <= SHARED_LIMIT[arch]
        assert kernel.hidden == 2
        assert bool(found["tensor_core"]) == (dtype != "fp32")


def test_a_later_architecture_takes_the_nearest_rows():
    assert tactics(64, "fp16", 103) == tactics(64, "fp16", 100)


def test_tactics_differ():
    table = tactics(64, "fp16", 90)
    assert len(set(table)) == len(table)
    assert {tactic.run for tactic in table if tactic.frames} == set(RUNS)


def test_heads_that_are_no_multiple_of_16_bytes_are_refused():
    with pytest.raises(ValueError, match="multiple of 16 bytes, got 12 x 2"):
        compile_tactic(tactics(12, "fp16", 80)[0], 12, "fp16", 80)


def test_a_launch_covers_the_positions_and_no_more():
    tactic = Tactic(16, 1, tactics(16, "fp16", 80)[-1].sweep, run=8)
    cdiv, less = (lambda a, b: -(-a // b)), (lambda a, b: int(a < b))
    assert tactic.programs(2, 16, 17, 5, cdiv, less) == 2 * 3 * 5
    assert tactic.programs(2, 17, 17, 5, cdiv, less) == 2 * 17 * 5 * cdiv(17, tactic.sweep.rows)
