"""The fused ops' Triton kernels against float64, on a GPU or in Triton's interpreter: run by test_fused_triton.py."""

import pytest
import torch
from accuracy import assert_as_accurate

from vstar_engine.kernels.e4m3 import LARGEST, to_e4m3, to_e4m3_ref
from vstar_engine.kernels.geglu import geglu, geglu_ref
from vstar_engine.kernels.groupnorm_silu import groupnorm_silu, groupnorm_silu_ref
from vstar_engine.kernels.guided_step import COEFFICIENTS, guided_step, guided_step_ref

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
@pytest.mark.parametrize("shape", [(3, 2, 2048), (1, 16), (77, 48)], ids=str)
def test_to_e4m3(shape, dtype):
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU of compute capability 8.9")
    x = (30 * torch.randn(shape)).to(DEVICE, dtype)
    x.view(-1)[:3] = torch.tensor([1e4, -1e4, 0.0])
    step = torch.tensor(0.25, device=DEVICE)
    got, wanted = to_e4m3(x, step).float(), to_e4m3_ref(x, step).float()
    assert got.shape == x.shape
    assert got.view(-1)[:3].tolist() == [LARGEST, -LARGEST, 0]
    if DEVICE == "cuda":
        assert torch.equal(got, wanted)
        return
    # the interpreter rounds ties away from even, and loses the carry where a value rounds up to a power of two
    carried = (wanted.abs().frexp().mantissa == 0.5) & (wanted.abs() > (x.float() / step).abs())
    assert carried.float().mean() < 0.1
    assert (got != wanted)[~carried].float().mean() <= 0.1
    assert ((got - wanted).abs() <= 0.13 * wanted.abs() + 2.0**-9)[~carried].all()


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
