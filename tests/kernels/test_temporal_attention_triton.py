"""The Triton kernels against float64, on a GPU or in Triton's interpreter."""

from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from golden.load_golden import Golden
from torch import Tensor

from support.accuracy import assert_as_accurate, relative_error
from support.pairwise import pairwise
from support.plain_attention import by_eager, exactly
from support.triton_device import DEVICE, INTERPRETED
from vstar_engine.kernels.gpu.device import Device
from vstar_engine.kernels.gpu.temporal_attention import temporal_attention_triton
from vstar_engine.kernels.gpu.temporal_attention_launch import ARCHITECTURES
from vstar_engine.kernels.temporal_attention import (
    temporal_attention,
    temporal_attention_dense,
    temporal_attention_dense_ref,
    temporal_attention_ref,
    toeplitz_bias,
)
from vstar_engine.machine.memory import LiveBytes
from vstar_engine.sampling.tar import toeplitz

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *([] if INTERPRETED else [pytest.mark.gpu])]
GOLDEN = Golden(str(Path(__file__).parents[1] / "golden"))

AXES: dict[str, tuple[Any, ...]] = {
    "T": (1, 2, 7, 16, 17, 31, 48, 64, 65, 100, 127, 128, 129, 200, 256, 300, 512),
    "head_dim": (8, 16, 40, 64, 80, 128),
    "dtype": ("float32", "float16", "bfloat16"),
    "layout": ("fused", "separate", "position_major", "misaligned", "one_batch"),
    "keys": ("same", "more", "fewer"),
    "bias": ("gaussian", "zero", "signed", "per_batch", "short", "dense"),
    "logits": ("normal", "negative", "huge"),
    "arch": (80, 90, 120),
}
SELECTION = pairwise(AXES)
WHOLE = ("T", "head_dim", "dtype", "layout")
RANDOM = Random(0)
# every combination of these, with the other axes drawn
MATRIX = [
    {**dict(zip(WHOLE, case, strict=True)), **{axis: RANDOM.choice(AXES[axis]) for axis in AXES if axis not in WHOLE}}
    for case in product(*(AXES[axis] for axis in WHOLE))
]


def named(cases: list[dict[str, Any]], marks: Any = ()) -> list[Any]:
    return [pytest.param(case, id="-".join(f"{v}" for v in case.values()), marks=marks) for case in cases]


def costly(case: dict[str, Any]) -> bool:
    """Returns whether a case takes the interpreter seconds; at the shipped head width long ones stay."""
    return INTERPRETED and case["T"] > 200 and case["head_dim"] != 64


def tensors(layout: str, batch: int, frames: int, positions: int, heads: int, head_dim: int) -> Tensor:
    """Draws (3, B, T, P, heads, head_dim) as views of the given layout."""
    if layout == "fused":
        return torch.randn(batch, frames, positions, 3, heads, head_dim).permute(3, 0, 1, 2, 4, 5)
    if layout == "position_major":
        return torch.randn(3, batch, positions, frames, heads, head_dim).transpose(2, 3)
    if layout == "misaligned":
        return torch.randn(3, batch, frames, positions, heads, head_dim + 1)[..., 1:]
    if layout == "one_batch":
        return torch.randn(3, 1, frames, positions, heads, head_dim).expand(-1, batch, -1, -1, -1, -1)
    return torch.randn(3, batch, frames, positions, heads, head_dim)


def draw_bias(kind: str, batch: int, frames: int, keys: int) -> Tensor:
    if kind == "dense":
        return torch.randn(batch, frames, keys)
    if kind == "gaussian":
        return toeplitz(frames, 4.0)[None]
    g = torch.randn(batch if kind == "per_batch" else 1, frames)
    # ends after three frames, so that far tiles have none
    g[:, 0 if kind == "zero" else 3 if kind == "short" else frames :] = 0.0
    return g


@pytest.mark.parametrize(
    "case",
    [
        *named([case for case in SELECTION if not costly(case)]),
        *named([case for case in SELECTION if costly(case)], pytest.mark.slow),
        *named(MATRIX, pytest.mark.slow),
    ],
)
def test_error_is_within_twice_eagers(case):
    frames, head_dim, dtype = case["T"], case["head_dim"], getattr(torch, case["dtype"])
    torch.manual_seed(frames * 1000 + head_dim)
    batch, positions, heads = (2, 9, 2) if frames <= 32 else (2, 2, 2) if frames <= 128 else (2, 1, 1)
    keys = {"same": frames, "more": frames + 5, "fewer": max(1, frames - 3)}[case["keys"]]
    qkv = tensors(case["layout"], batch, max(frames, keys), positions, heads, head_dim)
    q, k, v = qkv.to(dtype).to(DEVICE)
    if case["logits"] == "negative":
        k = -q
    if case["logits"] == "huge":
        # logits in the thousands
        q, k = q * 15, k * 15
    q, k, v = q[:, :frames], k[:, :keys], v[:, :keys]
    bias = draw_bias(case["bias"], batch, frames, keys).to(DEVICE)
    matrix = bias if case["bias"] == "dense" else toeplitz_bias(bias, frames, keys)
    ours = temporal_attention_triton(q, k, v, bias, on=None if DEVICE == "cuda" else Device(case["arch"], 0))
    exact = exactly(q, k, v, matrix)
    assert ours.is_contiguous()
    # of huge logits the few nearest ties make the error: PyTorch's is then its worst over more pairings of queries and keys
    pairings = [k.roll(shift, dims=1) for shift in range(8 if case["logits"] == "huge" else 1)]
    errors = [by_eager(q, k, v, matrix).double() - exactly(q, k, v, matrix) for k in pairings]
    eager = (exact + max(errors, key=lambda error: error.abs().max().item())).to(dtype)
    assert_as_accurate(ours, eager, exact)


# without multiprocessors runs are longest (8 positions); with many they shrink to one
@pytest.mark.parametrize("multiprocessors", [0, 1, 132])
@pytest.mark.parametrize("positions", [1, 7, 8, 9, 17])
def test_runs_of_positions_have_tails(positions, multiprocessors):
    torch.manual_seed(positions)
    q, k, v = tensors("fused", 1, 7, positions, 2, 16).to(DEVICE)
    g = torch.randn(1, 7, device=DEVICE)
    arch = 90 if DEVICE == "cpu" else 10 * torch.cuda.get_device_capability()[0]
    ours = temporal_attention_triton(q, k, v, g, on=Device(arch, multiprocessors))
    torch.testing.assert_close(ours, temporal_attention_ref(q, k, v, g), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES if INTERPRETED else ())
@pytest.mark.parametrize("frames", [16, 64, 96, 130])
def test_every_architectures_row_is_right(frames, arch):
    q, k, v = tensors("fused", 1, frames, 1, 1, 64).to(torch.float16)
    g = toeplitz(frames, 8.0)[None]
    ours = temporal_attention_triton(q, k, v, g, on=Device(arch, 0))
    torch.testing.assert_close(ours, temporal_attention_ref(q, k, v, g), atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("frames", [12, 16, 150])
def test_the_op_reaches_the_kernel(frames):
    q, k, v = tensors("fused", 2, frames, 2, 1, 16).to(DEVICE)
    g, matrix = torch.randn(frames, device=DEVICE), torch.randn(1, frames, frames, device=DEVICE)
    direct = temporal_attention_triton(q, k, v, g[None]), temporal_attention_triton(q, k, v, matrix)
    assert torch.equal(temporal_attention(q, k, v, g), direct[0])
    assert torch.equal(temporal_attention_dense(q, k, v, matrix), direct[1])


@pytest.mark.parametrize("frames", [12, 16, 130])
def test_nan_in_q_stays_in_its_row(frames):
    q, k, v = tensors("separate", 1, frames, 2, 1, 16).to(DEVICE)
    q[0, 5, 1, 0, 3] = float("nan")
    lost = temporal_attention_triton(q, k, v, torch.randn(1, frames, device=DEVICE)).isnan()
    assert lost[0, 5, 1, 0].all()
    assert lost.sum() == q.shape[-1]


@pytest.mark.parametrize("frames", [12, 130])
def test_strided_bias(frames):
    q, k, v = tensors("fused", 2, frames, 1, 1, 16).to(DEVICE)
    g = torch.randn(2, frames, 3, device=DEVICE)[..., 1]
    matrix = torch.randn(2, frames, frames, device=DEVICE).mT
    torch.testing.assert_close(temporal_attention_triton(q, k, v, g), temporal_attention_ref(q, k, v, g))
    torch.testing.assert_close(temporal_attention_triton(q, k, v, matrix), temporal_attention_dense_ref(q, k, v, matrix))


def test_offsets_beyond_32_bits():
    """Frames lie 2^30 elements apart; untouched pages of the allocation cost nothing on a CPU."""
    torch.use_deterministic_algorithms(False)
    frames, stride = 4, 2**30
    storage = torch.empty(frames * stride, dtype=torch.float16, device=DEVICE)
    q = storage.as_strided((1, frames, 1, 1, 16), (stride, stride, 16, 16, 1))
    q.copy_(torch.randn(q.shape))
    g = torch.randn(1, frames, device=DEVICE)
    packed = q.contiguous()
    assert torch.equal(temporal_attention_triton(q, q, q, g), temporal_attention_triton(packed, packed, packed, g))


@pytest.mark.slow
def test_more_rows_than_a_grid_axis_holds():
    q, k, v = tensors("fused", 2, 2, 33000, 1, 8).to(DEVICE)
    g = torch.randn(1, 2, device=DEVICE)
    torch.testing.assert_close(temporal_attention_triton(q, k, v, g, on=None), temporal_attention_ref(q, k, v, g))


QUICK = (
    "tar_f1",
    "tar_f17_std05",
    "tar_f16_neg",
    "tar_f32_mixed",
    "tar_f32_big_logits",
    "tar_f64_std8_scale05",
    "tar_f128_std4_scale2",
)
CASES = [
    pytest.param(case, id=case["name"], marks=() if case["name"] in QUICK else pytest.mark.slow)
    for case in GOLDEN.cases("tar_attention") + GOLDEN.cases("tar_attention_generated")
]


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    config, stored = case["config"], {name: torch.from_numpy(x) for name, x in GOLDEN.inputs(case).items()}
    chosen = stored.get("pos", torch.arange(config["positions"]))
    heads = (config["heads"], config.get("dim_head", -1))
    # (positions, frames, heads * head_dim) -> (1, frames, positions, heads, head_dim)
    q, k, v = (stored[name][chosen].unflatten(-1, heads).transpose(0, 1)[None].to(DEVICE) for name in "qkv")
    g = torch.zeros(q.shape[1])
    if config["regularised"]:
        g = toeplitz(q.shape[1], config["std"], config["scale"])
    out = temporal_attention(q, k, v, g.to(DEVICE))[0].transpose(0, 1).flatten(-2).cpu()
    probe = case.get("rounding_probe", {}).get("rel_l2")
    assert relative_error(out, stored["out"]) <= (min(1e-4, max(1e-5, 20 * probe)) if probe else 1e-5)


@pytest.mark.parametrize("frames", [16, 64, 256, pytest.param(512, marks=[pytest.mark.slow] * INTERPRETED)])
def test_only_the_output_is_allocated(frames):
    q, k, v = tensors("fused", 1, frames, 2, 1, 16).to(DEVICE)
    g = torch.randn(1, frames, device=DEVICE)
    with LiveBytes() as memory:
        out = temporal_attention_triton(q, k, v, g)
    # beside it the interpreter keeps a few numbers of the launch
    assert memory.peak <= out.nbytes + 256
