"""Runs triton_fused.py, in Triton's interpreter and on a GPU."""

import pytest

from support import triton_process

pytest.importorskip("triton", reason="needs Triton")


@pytest.mark.parametrize(("interpret", "selection"), triton_process.PROCESSES)
def test_kernels(interpret, selection):
    triton_process.check("triton_fused.py", interpret, selection)
