"""The op table: every op, shape, variant and dtype by every implementation, each held to twice PyTorch's error.

In a plain process the C++ kernels of each instruction set, and Triton's on a GPU; with TRITON_INTERPRET=1 Triton's in its
interpreter. Memory that an op leaves unwritten is NaN. FP8's ops round, which is another bar: test_fp8_triton, test_fp8_linear.
"""

import pytest
import torch

from support.accuracy import assert_as_accurate
from support.interpreter import DEVICE, INTERPRETED, SLACK
from support.op_table import OPS, placed, widened
from vstar_engine.kernels.cpu import library

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ISAS = library._load().isas if library.status()[0] else ()
TRITON = "triton"
IMPLEMENTATIONS = [TRITON] if INTERPRETED else [*ISAS, TRITON]


def cases():
    """Yields the lines of the table."""
    for name, op in OPS.items():
        for by in IMPLEMENTATIONS:
            dtypes = op.triton_dtypes if by == TRITON else op.cpu_dtypes
            for shape in (*op.shapes, *(() if INTERPRETED else op.large)):
                for variant in op.variants:
                    for dtype in dtypes:
                        words = (name, by, str(shape).replace(" ", ""), str(dtype)[6:], variant)
                        marks = [pytest.mark.gpu] if by == TRITON and not INTERPRETED else []
                        yield pytest.param(name, by, shape, variant, dtype, id=" ".join(filter(None, words)), marks=marks)


@pytest.mark.parametrize(("name", "by", "shape", "variant", "dtype"), list(cases()))
@torch.no_grad()
def test_op(name, by, shape, variant, dtype, monkeypatch):
    op = OPS[name]
    if by != TRITON:
        monkeypatch.setenv("VSTAR_CPU_ISA", by)
    given = placed(op.draw(shape, dtype, op.variants[variant]), DEVICE if by == TRITON else "cpu")
    got, eager, exact = (op.triton if by == TRITON else op.cpu)(*given), op.ref(*given), op.ref(*widened(given))
    if isinstance(got, torch.Tensor):
        got, eager, exact = (got,), (eager,), (exact,)
    assert got[0].stride() == given[0].stride() if op.like_first else got[0].is_contiguous()
    for ours, theirs, wide in zip(got, eager, exact, strict=True):
        assert_as_accurate(ours, theirs, wide, SLACK.get(dtype, 0.0) if by == TRITON else 0.0)
