"""The fused ops' Triton kernels against float64, on a GPU or in Triton's interpreter: run by test_fused_triton.py."""

import pytest
import torch

from support.accuracy import assert_as_accurate
from vstar_engine.kernels.geglu import geglu, geglu_ref
from vstar_engine.kernels.gpu import linear_candidates
from vstar_engine.kernels.gpu.device import Device
from vstar_engine.kernels.gpu.linear import Tile, linear_triton
from vstar_engine.kernels.groupnorm_silu import groupnorm_silu, groupnorm_silu_ref
from vstar_engine.kernels.guided_step import COEFFICIENTS, guided_step, guided_step_ref
from vstar_engine.kernels.linear import LayerNorm, linear_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Triton's interpreter cuts a float32 off where it makes a bfloat16, which can cost a whole step
SLACK = {torch.bfloat16: 4e-3 if DEVICE == "cpu" else 0.0}


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fills what is not initialised with NaN, outputs above all."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 256), (3, 2, 2560), (5, 6), (1, 2)], ids=str)
def test_geglu(shape, dtype):
    x = (4 * torch.randn(shape)).to(DEVICE, dtype)
    assert_as_accurate(geglu(x), geglu_ref(x), geglu_ref(x.double()), SLACK.get(dtype, 0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 3, 16, 24), (3, 4, 1, 5, 7), (1, 1)], ids=str)
def test_guided_step(shape, dtype):
    """Every video by coefficients of its own, the last without guidance; predictions in the network's dtype."""
    videos = shape[0]
    latents, noise = torch.randn(2, *shape).to(DEVICE)
    eps = torch.randn(2 * videos, *shape[1:]).to(DEVICE, dtype)
    plain = torch.tensor([videos + i for i in range(videos - 1)] + [videos - 1]).to(DEVICE)
    coefficients = (0.2 + 3 * torch.rand(videos, len(COEFFICIENTS))).to(DEVICE)
    given = latents, eps, plain, coefficients, noise
    exact = guided_step_ref(latents.double(), eps.double(), plain, coefficients.double(), noise.double())
    for got, eager, wanted in zip(guided_step(*given), guided_step_ref(*given), exact, strict=True):
        assert_as_accurate(got, eager, wanted)


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 64, 5, 13), 32), ((1, 80, 7, 3, 4), 8), ((3, 8, 1), 4), ((2, 24, 6000), 1)], ids=str
)
def test_groupnorm_silu(shape, groups, dtype, silu):
    x = (3 * torch.randn(shape) + 5).to(DEVICE, dtype).movedim(1, -1).contiguous().movedim(-1, 1)
    weight, bias = torch.randn(2, shape[1]).to(DEVICE, dtype)
    got = groupnorm_silu(x, groups, weight, bias, 1e-5, silu)
    assert got.stride() == x.stride()
    eager = groupnorm_silu_ref(x, groups, weight, bias, 1e-5, silu)
    exact = groupnorm_silu_ref(x.double(), groups, weight.double(), bias.double(), 1e-5, silu)
    assert_as_accurate(got, eager, exact, SLACK.get(dtype, 0.0))


HALVES = [torch.float16, torch.bfloat16]
# small, for the interpreter: two stages and no pipeline
TILE = Tile(16, 16, 16, 1, 2)
AROUND = {
    "plain": (),
    "bias": ("bias",),
    "bias, residual": ("bias", "residual"),
    "residual": ("residual",),
    "norm": ("norm",),
    "norm, bias": ("norm", "bias"),
    "bias, gate": ("bias", "gate"),
    "norm, bias, gate": ("norm", "bias", "gate"),
    "norm, gate": ("norm", "gate"),
}


def problem(shape, around, dtype):
    """Draws x, weight, bias, residual, whether to gate, and the norm; rows lie far from zero where they are normed."""
    *rows, into, made = shape
    gate, norm = "gate" in around, "norm" in around
    x = torch.randn(*rows, into) + (30 if norm else 0)
    weight = torch.randn(2 * made if gate else made, into) / into**0.5
    bias = torch.randn(len(weight)) if "bias" in around else None
    residual = torch.randn(*rows, made) if "residual" in around else None
    gains = (1 + torch.rand(into), torch.randn(into)) if norm else ()
    tensors = [None if tensor is None else tensor.to(DEVICE, dtype) for tensor in (x, weight, bias, residual, *gains)]
    return (*tensors[:4], gate, LayerNorm(*tensors[4:], 1e-5) if norm else None)


def wide(given):
    """The same problem in float64."""
    *tensors, gate, norm = given
    norm = norm and LayerNorm(norm.weight.double(), norm.bias.double(), norm.eps)
    return (*(None if tensor is None else tensor.double() for tensor in tensors), gate, norm)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(2, 24, 32, 48), (1, 7, 48, 16), (3, 17, 40, 24), (5, 6, 3), (1, 16, 16)], ids=str)
def test_linear(shape, dtype, around):
    given = problem(shape, AROUND[around], dtype)
    *tensors, gate, norm = given
    got = linear_triton(*tensors, gate, *(norm or (None, None, 0.0)), TILE)
    # a product of one pass more is not worse: what PyTorch rounds between the passes stays in float32
    assert_as_accurate(got, linear_ref(*given), linear_ref(*wide(given)), SLACK.get(dtype, 0.0))


@pytest.mark.parametrize("tile", [Tile(32, 16, 16, 4, 3), Tile(16, 32, 32, 4, 4), Tile(16, 16, 64, 1, 2)], ids=str)
def test_linear_tiles_cover_everything_once(tile):
    """More blocks of rows than one group, the last group short; a sum shorter than what is loaded at a time."""
    given = problem((150, 40, 72), ("bias", "residual"), torch.float16)
    *tensors, gate, _ = given
    got = linear_triton(*tensors, gate, None, None, 0.0, tile)
    assert_as_accurate(got, linear_ref(*given), linear_ref(*wide(given)))


def test_a_norm_of_rows_far_from_zero_does_not_cancel():
    """E[x^2] - E[x]^2 in float32 would be off by a tenth beside a mean of 1,900; float16 steps by 1 there."""
    x = (torch.randn(20, 48) + 1900).to(DEVICE, torch.float16)
    weight, ones, zeros = (tensor.to(DEVICE, torch.float16) for tensor in (torch.eye(48), torch.ones(48), torch.zeros(48)))
    got = linear_triton(x, weight, None, None, False, ones, zeros, 1e-5, TILE)
    exact = torch.nn.functional.layer_norm(x.double(), (48,), eps=1e-5)
    assert float((got.double() - exact).abs().max() / exact.abs().max()) < 1e-3


@pytest.mark.parametrize("best", ["PyTorch", "Triton, 128x256", "Triton, 128x128"])
def test_the_way_that_a_timer_prefers_computes(best, monkeypatch):
    given = problem((4, 32, 16), ("norm", "bias", "residual"), torch.float16)
    *tensors, gate, norm = given
    chosen = []

    def prefer(case, ways):
        chosen.append((case, tuple(ways)))
        return ways[best]()

    monkeypatch.setattr(linear_candidates, "fastest", prefer)
    got = linear_candidates.linear_gpu(*tensors, gate, *norm)
    assert_as_accurate(got, linear_ref(*given), linear_ref(*wide(given)))
    where = f"{tensors[0].device}"
    assert chosen == [
        (f"linear 4x32 by 16, norm, bias, residual, float16 on {where}", ("PyTorch", "Triton, 128x256", "Triton, 128x128"))
    ]


@pytest.mark.parametrize(
    ("shape", "around", "arch"),
    [
        ((3, 32, 24), ("residual",), 90),
        ((3, 24, 48), ("residual",), 90),
        ((1, 16384, 16), ("norm",), 90),
        ((3, 32, 32), ("residual",), 75),
        ((3, 32, 32), ("bias",), 90),
    ],
    ids=["odd result", "odd sum", "long row", "old GPU", "nothing spared"],
)
def test_what_the_kernel_is_not_for_is_pytorchs_alone(shape, around, arch, monkeypatch):
    *tensors, gate, norm = problem(shape, around, torch.float16)
    monkeypatch.setattr(linear_candidates, "device", lambda x: Device(arch, 1))
    monkeypatch.setattr(linear_candidates, "fastest", lambda case, ways: tuple(ways))
    assert linear_candidates.linear_gpu(*tensors, gate, *(norm or (None, None, 0.0))) == ("PyTorch",)
