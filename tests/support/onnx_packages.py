"""Skips a module of tests where ONNX is not installed; the CI sets VSTAR_ONNX=1 and then nothing is skipped."""

import os

import pytest

if os.environ.get("VSTAR_ONNX") != "1":
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}: make test")
