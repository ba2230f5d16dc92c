"""The TensorRT plugins' kernel, launched as a plugin's launch is, on a GPU or in Triton's interpreter."""

import pytest
import torch

from support.accuracy import assert_as_accurate
from support.plain_attention import by_eager, exactly
from support.triton_device import DEVICE, INTERPRETED
from vstar_engine.kernels.gpu.temporal_attention import LOG2E
from vstar_engine.kernels.gpu.temporal_attention_launch import padded
from vstar_engine.kernels.temporal_attention import toeplitz_bias
from vstar_engine.kernels.tensorrt.tactics import plugin_kernel, tactics

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.mark.parametrize(("dtype", "frames", "g_rows"), [("fp16", 7, 2), ("fp32", 16, 1), ("fp16", 33, 2)])
def test_every_tactic_is_right_at_any_number_of_frames(dtype, frames, g_rows):
    batch, positions, heads, head_dim = 2, 3, 1, 16
    kind = {"fp16": torch.float16, "fp32": torch.float32}[dtype]
    q, k, v = torch.randn(3, batch, frames, positions, heads, head_dim).to(DEVICE, kind)
    g = torch.randn(g_rows, frames).to(DEVICE)
    matrix = toeplitz_bias(g, frames, frames)
    # every tile once, with the shorter of its runs, and the sweep
    for tactic in tactics(head_dim, dtype, 80)[::2]:
        out = torch.full_like(q, torch.nan)
        programs = tactic.programs(batch, frames, positions, heads, lambda a, b: -(-a // b), lambda a, b: int(a < b))
        plugin_kernel[(programs,)](
            q, k, v, g, frames, positions, heads, tactic.run, frames if g_rows > 1 else 0, out,
            SCALE=head_dim**-0.5 * LOG2E, D=head_dim, BD=padded(head_dim), UNIT=16 // kind.itemsize,
            N=tactic.frames, STAGES=tactic.stages, ROWS=tactic.sweep.rows, KEYS=tactic.sweep.keys,
        )  # fmt: skip
        assert_as_accurate(out, by_eager(q, k, v, matrix), exactly(q, k, v, matrix))
