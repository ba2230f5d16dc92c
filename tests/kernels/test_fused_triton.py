"""The fused ops' Triton kernels against float64, on a GPU or in Triton's interpreter."""

import pytest
import torch

from support.accuracy import assert_as_accurate
from support.triton_device import DEVICE, INTERPRETED, SLACK
from vstar_engine.kernels import linear as op
from vstar_engine.kernels.geglu import geglu, geglu_ref
from vstar_engine.kernels.gpu.device import device
from vstar_engine.kernels.gpu.linear import Tile, linear_triton
from vstar_engine.kernels.groupnorm_silu import groupnorm_silu, groupnorm_silu_ref
from vstar_engine.kernels.guided_step import COEFFICIENTS, guided_step, guided_step_ref
from vstar_engine.kernels.linear import candidates, linear_ref
from vstar_engine.kernels.problems import LinearProblem

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *([] if INTERPRETED else [pytest.mark.gpu])]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 256), (3, 2, 2560), (5, 6), (1, 2)], ids=str)
def test_geglu(shape, dtype):
    x = (4 * torch.randn(shape)).to(DEVICE, dtype)
    assert_as_accurate(geglu(x), geglu_ref(x), geglu_ref(x.double()), SLACK.get(dtype, 0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "depth"), [((2, 4, 3, 16, 24), 2), ((2, 4, 3, 16, 24), 0), ((3, 4, 1, 5, 7), 1), ((1, 1), 2)], ids=str
)
def test_guided_step(shape, depth, dtype):
    """Every video by coefficients of its own, the last without guidance; predictions in the network's dtype."""
    videos = shape[0]
    latents, noise = torch.randn(2, *shape).to(DEVICE)
    eps = torch.randn(2 * videos, *shape[1:]).to(DEVICE, dtype)
    plain = torch.tensor([videos + i for i in range(videos - 1)] + [videos - 1]).to(DEVICE)
    coefficients = (0.2 + 3 * torch.rand(videos, len(COEFFICIENTS) + depth)).to(DEVICE)
    history = torch.randn(videos, depth, *shape[1:]).to(DEVICE) if depth else None
    given = latents, eps, plain, coefficients, noise, history
    exact = guided_step_ref(*(x.double() if x is not None and x.is_floating_point() else x for x in given))
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
    """Draws a problem; rows lie far from zero where they are normed."""
    *rows, in_features, out_features = shape
    gate, norm = "gate" in around, "norm" in around
    x = torch.randn(*rows, in_features) + (30 if norm else 0)
    weight = torch.randn(2 * out_features if gate else out_features, in_features) / in_features**0.5
    bias = torch.randn(len(weight)) if "bias" in around else None
    residual = torch.randn(*rows, out_features) if "residual" in around else None
    gains = (1 + torch.rand(in_features), torch.randn(in_features)) if norm else ()
    tensors = [None if tensor is None else tensor.to(DEVICE, dtype) for tensor in (x, weight, bias, residual, *gains)]
    return LinearProblem(*tensors[:4], gate, *tensors[4:], *([1e-5] if norm else []))


def wide(given):
    """The same problem in float64."""
    return LinearProblem(*(value.double() if isinstance(value, torch.Tensor) else value for value in given))


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(2, 24, 32, 48), (1, 7, 48, 16), (3, 17, 40, 24), (5, 6, 3), (1, 16, 16)], ids=str)
def test_linear(shape, dtype, around):
    given = problem(shape, AROUND[around], dtype)
    got = linear_triton(given, TILE)
    # a product of one pass more is not worse: what PyTorch rounds between the passes stays in float32
    assert_as_accurate(got, linear_ref(given), linear_ref(wide(given)), SLACK.get(dtype, 0.0))


@pytest.mark.parametrize("tile", [Tile(32, 16, 16, 4, 3), Tile(16, 32, 32, 4, 4), Tile(16, 16, 64, 1, 2)], ids=str)
def test_linear_tiles_cover_everything_once(tile):
    """More blocks of rows than one group, the last group short; a sum shorter than what is loaded at a time."""
    given = problem((150, 40, 72), ("bias", "residual"), torch.float16)
    got = linear_triton(given, tile)
    assert_as_accurate(got, linear_ref(given), linear_ref(wide(given)))


def test_a_norm_of_rows_far_from_zero_does_not_cancel():
    """E[x^2] - E[x]^2 in float32 would be off by a tenth beside a mean of 1,900; float16 steps by 1 there."""
    x = (torch.randn(20, 48) + 1900).to(DEVICE, torch.float16)
    weight, ones, zeros = (tensor.to(DEVICE, torch.float16) for tensor in (torch.eye(48), torch.ones(48), torch.zeros(48)))
    got = linear_triton(LinearProblem(x, weight, None, None, False, ones, zeros, 1e-5), TILE)
    exact = torch.nn.functional.layer_norm(x.double(), (48,), eps=1e-5)
    assert float((got.double() - exact).abs().max() / exact.abs().max()) < 1e-3


TRIED = ("PyTorch", "Triton, 128x256", "Triton, 128x128")


@pytest.mark.parametrize("best", TRIED)
def test_every_candidate_computes_the_layer(best):
    given = problem((4, 32, 16), ("norm", "bias", "residual"), torch.float16)
    found = candidates(given, 90)
    assert tuple(found) == TRIED
    assert_as_accurate(found[best](), linear_ref(given), linear_ref(wide(given)))


def test_the_op_computes_by_what_is_chosen(monkeypatch):
    given, cases = problem((4, 32, 16), ("norm", "bias", "residual"), torch.float16), []

    def last(case, found):
        cases.append(case)
        return list(found.values())[-1]()

    monkeypatch.setattr(op, "autotune", last)
    chosen = candidates(given, device(given.x).arch)[TRIED[-1]]()
    assert torch.equal(op._on_gpu(*given), chosen)
    assert cases == [f"linear 4x32 by 16, norm, bias, residual, float16 on {given.x.device}"]


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
def test_what_the_kernel_is_not_for_is_pytorchs_alone(shape, around, arch):
    assert tuple(candidates(problem(shape, around, torch.float16), arch)) == ("PyTorch",)
