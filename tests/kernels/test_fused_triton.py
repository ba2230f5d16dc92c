"""The linear layer's Triton kernel beyond the op table: tiles, candidates and the choice among them."""

import pytest
import torch

from support.accuracy import assert_as_accurate
from support.op_table import TILE_SIDES, draw_linear, placed, widened
from support.triton_device import DEVICE, INTERPRETED
from vstar_engine.kernels import linear as op
from vstar_engine.kernels.gpu.device import device
from vstar_engine.kernels.gpu.linear import Tile, linear_triton
from vstar_engine.kernels.linear import candidates, linear_ref
from vstar_engine.kernels.problems import LinearProblem

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *([] if INTERPRETED else [pytest.mark.gpu])]
TILE = Tile(*TILE_SIDES)


def problem(shape, around, dtype):
    return LinearProblem(*placed(draw_linear(shape, dtype, around), DEVICE))


def wide(given):
    """The same problem in float64."""
    return LinearProblem(*widened(given))


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
