"""Frame attention's Triton kernel against float64, on a GPU or in Triton's interpreter."""

import math

import pytest
import torch

from support.accuracy import assert_as_accurate
from support.triton_device import DEVICE, INTERPRETED
from vstar_engine.kernels.frame_attention import frame_attention_ref
from vstar_engine.kernels.gpu.device import Device
from vstar_engine.kernels.gpu.frame_attention import frame_attention_triton
from vstar_engine.kernels.problems import FrameTables

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *([] if INTERPRETED else [pytest.mark.gpu])]

# frames, tokens, head_dim, dtype, layout, rule, architecture
CASES = [
    (1, 16, 16, "float32", "fused", "plain", 80),
    (3, 5, 16, "float32", "fused", "bias", 80),
    (4, 64, 64, "float16", "separate", "bias", 80),
    (3, 33, 64, "bfloat16", "fused", "rowmax", 90),
    (5, 7, 12, "float32", "misaligned", "all", 120),
    (2, 70, 128, "float16", "fused", "decay", 80),
    (3, 32, 64, "float32", "separate", "all", 90),
    (2, 130, 64, "float16", "fused", "rowmax", 90),
    (4, 1, 40, "bfloat16", "separate", "all", 100),
]


def rule(name, frames):
    b = torch.randn(frames, frames, device=DEVICE)
    b[0, frames // 2 + 1 :] = -math.inf
    a, g = torch.rand(frames, device=DEVICE) - 0.5, torch.randn(frames, device=DEVICE)
    return {
        "plain": FrameTables(),
        "bias": FrameTables(b=b),
        "rowmax": FrameTables(g=g),
        "decay": FrameTables(b=b, decay=0.9, beyond=frames * 4),
        "all": FrameTables(a, g, b, 0.7, frames * 4),
    }[name]


@pytest.mark.parametrize(("frames", "tokens", "head_dim", "dtype", "layout", "name", "arch"), CASES)
def test_it_is_as_accurate_as_pytorch(frames, tokens, head_dim, dtype, layout, name, arch):
    torch.manual_seed(0)
    count, kind = frames * tokens, getattr(torch, dtype)
    if layout == "fused":
        qkv = torch.randn(1, count, 3, 2, head_dim, device=DEVICE).unbind(2)
    else:
        beyond = 1 if layout == "misaligned" else 0
        qkv = torch.randn(3, 1, count, 2, head_dim + beyond, device=DEVICE)[..., beyond:].unbind(0)
    q, k, v = (x.to(kind) if layout != "misaligned" else x for x in qkv)
    tables = rule(name, frames)
    exact = frame_attention_ref(q.double(), k.double(), v.double(), tables, tokens)
    ours = frame_attention_triton(q, k, v, tables, tokens, Device(arch, 0) if INTERPRETED else None)
    # the interpreter truncates to bfloat16 where a GPU rounds
    slack = 8e-3 if kind == torch.bfloat16 and INTERPRETED else 0.0
    assert_as_accurate(ours, frame_attention_ref(q, k, v, tables, tokens), exact, slack)
