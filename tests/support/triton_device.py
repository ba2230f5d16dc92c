"""Where the tests of Triton kernels run: on a GPU or, where TRITON_INTERPRET=1 was set for the process, in the interpreter.

Triton reads that variable when a kernel is defined, so `make test` starts a process for the interpreter (`test-interpreter`).
"""

import pytest

from support.interpreter import DEVICE, INTERPRETED, SLACK

pytest.importorskip("triton", reason="needs Triton")

__all__ = ["DEVICE", "INTERPRETED", "SLACK"]
