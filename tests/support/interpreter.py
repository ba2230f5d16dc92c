"""Whether this process computes with Triton's interpreter, on which device Triton's tests compute, and their allowance."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Triton's interpreter cuts a float32 off where it makes a bfloat16, which can cost a whole step
SLACK = {torch.bfloat16: 4e-3 if INTERPRETED else 0.0}
