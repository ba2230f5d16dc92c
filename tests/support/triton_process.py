"""A process for tests of Triton kernels: TRITON_INTERPRET is read when a kernel is defined."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
WITHOUT_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PROCESSES = [
    pytest.param("1", "not slow", id="interpreter-selection"),
    pytest.param("1", "slow", id="interpreter-matrix", marks=pytest.mark.slow),
    pytest.param("0", "not slow", id="gpu-selection", marks=[pytest.mark.gpu, WITHOUT_GPU]),
    pytest.param("0", "slow", id="gpu-matrix", marks=[pytest.mark.gpu, pytest.mark.slow, WITHOUT_GPU]),
]


def check(file, interpret, selection):
    """Runs those tests of a file that a mark selects, and fails where one does."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", selection, f"tests/kernels/{file}"]
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    if interpret == "1":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # the interpreter is for the CPU
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
