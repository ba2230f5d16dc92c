"""The ops of an FP8 layer on a CPU: shapes that are followed, the definition, what is refused."""

import pytest
import torch

from support.accuracy import relative_error
from vstar_engine.kernels.fp8_layernorm import norm_e4m3
from vstar_engine.kernels.fp8_linear import linear_e4m3, linear_e4m3_ref
from vstar_engine.kernels.problems import E4M3, Fp8LinearProblem

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# half of e4m3's step between two powers of two
ROUNDING = 2.0**-4


def products(dtype=torch.float16, x=(2, 3, 32), weight=(16, 32), residual=None, gate=False, then=None, rounded=False):
    rows, weight = torch.randn(x).to(E4M3 if rounded else dtype), torch.randn(weight).to(E4M3)
    beside = None if residual is None else torch.randn(residual).to(dtype)
    bias = torch.randn(len(weight)).to(dtype)
    return Fp8LinearProblem(rows, weight, torch.tensor(0.5), torch.tensor(0.01), bias, beside, gate, then, dtype)


LAYERS = {
    "plain": {},
    "residual": {"residual": (2, 3, 16)},
    "gate": {"gate": True, "rounded": True},
    "rounded then": {"gate": True, "then": torch.tensor(0.25)},
    "float32": {"dtype": torch.float32, "residual": (2, 3, 16), "rounded": True},
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_layer_is_an_op_that_shapes_follow_and_its_definition(kind):
    torch.manual_seed(6)
    given = products(**LAYERS[kind])
    torch.library.opcheck(torch.ops.vstar.linear_e4m3, given, test_utils="test_faketensor")
    ours, definition = linear_e4m3(given), linear_e4m3_ref(given)
    assert (ours.shape, ours.dtype) == (definition.shape, definition.dtype)
    # sums in another order may round to the next number
    assert relative_error(ours.float(), definition.float()) < (ROUNDING if ours.dtype == E4M3 else 1e-3)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weight": (16, 24)}, r"x must be \(..., 24\), got \(2, 3, 32\)"),
        ({"weight": (15, 32), "gate": True}, "a gated weight must have an even number of rows, got 15"),
        ({"residual": (2, 3, 8)}, r"residual must be \(2, 3, 16\), got \(2, 3, 8\)"),
        ({"weight": (16, 32, 1)}, r"weight must be \(out, in\) torch.float8_e4m3fn, got \(16, 32, 1\)"),
        ({"then": torch.ones(1)}, r"steps and scale must be float32 scalars, got torch.float32 \(1,\)"),
    ],
    ids=["width", "odd gate", "residual", "weight", "step"],
)
def test_what_cannot_be_multiplied_is_refused_in_a_sentence(changed, words):
    with pytest.raises(ValueError, match=words):
        linear_e4m3(products(**changed))


def test_what_cannot_be_normed_is_refused_in_a_sentence():
    x, ones, step = torch.randn(3, 32), torch.ones(32), torch.tensor(0.5)
    torch.library.opcheck(torch.ops.vstar.norm_e4m3, (x, ones, ones, 1e-5, step), test_utils="test_faketensor")
    with pytest.raises(ValueError, match=r"must be \(..., width\), \(width,\) and \(width,\), got \(3, 32\), \(16,\), \(32,\)"):
        norm_e4m3(x, ones[:16], ones, 1e-5, step)
    with pytest.raises(ValueError, match=r"step must be a float32 scalar, got torch.float64 \(\)"):
        norm_e4m3(x, ones, ones, 1e-5, step.double())
