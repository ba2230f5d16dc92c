"""Where the tests of Triton kernels run: on a GPU or, where TRITON_INTERPRET=1 was set for the process, in the interpreter.

Triton reads that variable when a kernel is defined, so `make test` starts a process for the interpreter (`test-interpreter`).
"""

import os

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Triton's interpreter cuts a float32 off where it makes a bfloat16, which can cost a whole step
SLACK = {torch.bfloat16: 4e-3 if INTERPRETED else 0.0}
