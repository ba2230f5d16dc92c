"""The Triton kernels of FP8 against their definitions, on a GPU or in Triton's interpreter."""

import itertools

import pytest
import torch
from torch import nn

from support.accuracy import assert_as_accurate, relative_error
from support.triton_device import DEVICE, INTERPRETED, SLACK
from vstar_engine.kernels import fp8_linear as op
from vstar_engine.kernels.fp8_conv2d import conv_e4m3, conv_e4m3_ref
from vstar_engine.kernels.fp8_layernorm import norm_e4m3, norm_e4m3_ref
from vstar_engine.kernels.fp8_linear import candidates, linear_e4m3_ref
from vstar_engine.kernels.fp8_quantize import LARGEST, to_e4m3, to_e4m3_ref
from vstar_engine.kernels.gpu import fp8_conv2d, fp8_linear
from vstar_engine.kernels.gpu.linear import Tile
from vstar_engine.kernels.problems import E4M3, Fp8ConvProblem, Fp8LinearProblem
from vstar_engine.networks import fp8
from vstar_engine.networks.layers import FeedForward, RowNorm

pytestmark = [pytest.mark.usefixtures("poisoned_memory", "has_e4m3"), *([] if INTERPRETED else [pytest.mark.gpu])]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]
ARCHITECTURES = (89, 90, 100, 120)
# half of e4m3's step between two powers of two, less of a sum
ROUNDING = 2.0**-4


@pytest.fixture
def has_e4m3():
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU of compute capability 8.9")


def assert_rounded(got, wanted, values, strays=0.0):
    """Holds roundings of values to the definition's: to each number or, `strays` at most of them, to the next one."""
    if DEVICE == "cuda":
        assert (got != wanted).float().mean() <= strays
        assert ((got - wanted).abs() <= 0.13 * wanted.abs() + 2.0**-9).all()
        return
    # the interpreter rounds ties away from even, and loses the carry where a value rounds up to a power of two
    carried = (wanted.abs().frexp().mantissa == 0.5) & (wanted.abs() > values.abs())
    assert carried.float().mean() < 0.1
    assert (got != wanted)[~carried].float().mean() <= 0.1
    assert ((got - wanted).abs() <= 0.13 * wanted.abs() + 2.0**-9)[~carried].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 2048), (1, 16), (77, 48)], ids=str)
def test_to_e4m3(shape, dtype):
    x = (30 * torch.randn(shape)).to(DEVICE, dtype)
    x.view(-1)[:3] = torch.tensor([1e4, -1e4, 0.0])
    step = torch.tensor(0.25, device=DEVICE)
    got, wanted = to_e4m3(x, step).float(), to_e4m3_ref(x, step).float()
    assert got.shape == x.shape
    assert got.view(-1)[:3].tolist() == [LARGEST, -LARGEST, 0]
    assert_rounded(got, wanted, x.float() / step)


CONVOLUTIONS = {
    "3x3": ((2, 6, 5, 32), (16, 3, 3), 1, (1, 1)),
    "3x3, stride 2": ((1, 6, 8, 48), (32, 3, 3), 2, (1, 1)),
    "3x3, stride 2, odd": ((2, 7, 5, 16), (16, 3, 3), 2, (1, 1)),
    "over frames": ((2, 5, 12, 32), (32, 3, 1), 1, (1, 0)),
    "a frame alone": ((1, 1, 7, 16), (16, 3, 1), 1, (1, 0)),
    "odd channels": ((1, 4, 3, 21), (19, 3, 3), 1, (1, 1)),
    "smaller than its kernel": ((3, 1, 2, 5), (3, 3, 3), 1, (1, 1)),
    "no padding": ((1, 5, 6, 16), (16, 3, 2), 2, (0, 0)),
}
# sides that a stride divides and does not, channels below, at and beyond what is summed at a time
MATRIX = [
    ((images, *sides, in_channels), (out_channels, *kernel), stride, (kernel[0] // 2, kernel[1] // 2))
    for kernel, stride in itertools.product([(3, 3), (3, 1), (1, 1), (5, 3)], [1, 2, 3])
    for images, sides in [(1, (1, 1)), (3, (4, 9)), (2, (12, 6))]
    for in_channels, out_channels in [(8, 24), (32, 16), (80, 40)]
]
# of the launch table
TILES = sorted({tile for arch in ARCHITECTURES for tile in fp8_conv2d.tiles(arch)})


def convolution(case, dtype):
    """Draws what an FP8 convolution takes, with borders and centre of its kernel alike in size."""
    shape, kernel, stride, padding = case
    x, weight = (30 * torch.randn(sides) for sides in (shape, (*kernel, shape[-1])))
    values = (tensor.to(DEVICE).to(E4M3) for tensor in (x, weight))
    factors = (torch.tensor(factor, device=DEVICE) for factor in (0.25, 0.0123))
    return Fp8ConvProblem(*values, *factors, (10 * torch.randn(kernel[0])).to(DEVICE, dtype), stride, padding)


def assert_convolved(got, given, slack=0.0):
    exact = conv_e4m3_ref(given._replace(bias=given.bias.double()))
    assert_as_accurate(got, conv_e4m3_ref(given), exact, slack)


# a plain one, an odd one and a tiny one in every dtype, which is that of the bias and the result alone; others in float16
EVERY_DTYPE = ("3x3", "odd channels", "smaller than its kernel")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{dtype}-{name}", marks=[] if quick else [pytest.mark.slow])
        for dtype in DTYPES
        for name, case, quick in [
            *((name, case, name in EVERY_DTYPE or dtype == torch.float16) for name, case in CONVOLUTIONS.items()),
            *((str(case), case, False) for case in MATRIX),
        ]
    ],
)
def test_conv_e4m3(case, dtype):
    given = convolution(case, dtype)
    # 32 channels are what an instruction of FP8 sums
    got = fp8_conv2d.conv_e4m3_triton(given, Tile(32, 16, 32, 4, 2))
    assert_convolved(got, given, SLACK.get(dtype, 0.0))


@pytest.mark.parametrize(
    "tile", [pytest.param(tile, id=str(tile), marks=pytest.mark.slow if i else ()) for i, tile in enumerate(TILES)]
)
def test_conv_e4m3_tiles_cover_everything_once(tile):
    """More blocks of positions than one group, the last group short, at the launch table's own tiles."""
    given = convolution(CONVOLUTIONS["3x3"], torch.float16)
    given = given._replace(x=torch.cat([given.x] * 40))
    assert_convolved(fp8_conv2d.conv_e4m3_triton(given, tile), given)


def test_conv_e4m3_by_its_op():
    given = convolution(CONVOLUTIONS["3x3, stride 2"], torch.float16)
    turned = given.x.transpose(1, 2).contiguous().transpose(1, 2)  # strides of its own
    assert_convolved(conv_e4m3(given._replace(x=turned)), given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 320), (3, 48), (1, 16), (7, 3, 21)], ids=str)
def test_norm_e4m3(shape, dtype):
    """Rows far from zero, of more and of fewer values than a program's padded ones; a last program that is not full."""
    x = (3 * torch.randn(shape) + 30).to(DEVICE, dtype)
    gain, shift = (1 + torch.rand(shape[-1])).to(DEVICE, dtype), torch.randn(shape[-1]).to(DEVICE, dtype)
    step = torch.tensor(2.0**-6, device=DEVICE)
    got = norm_e4m3(x, gain, shift, 1e-5, step)
    wide = norm_e4m3_ref(x.double(), gain.double(), shift.double(), 1e-5, step).float()
    exact = torch.nn.functional.layer_norm(x.double(), shape[-1:], gain.double(), shift.double(), 1e-5).float() / step
    assert (got.shape, got.dtype) == (x.shape, E4M3)
    # a sum in another order may fall on the other side of a half
    assert_rounded(got.float(), wide, exact, strays=0.01)


def test_what_a_norm_makes_too_large_is_cut():
    x, ones = torch.randn(4, 64).to(DEVICE, torch.float16), torch.ones(64).to(DEVICE, torch.float16)
    got = norm_e4m3(x, 1000 * ones, 0 * ones, 1e-5, torch.tensor(0.5, device=DEVICE)).float()
    assert got.abs().max() == LARGEST
    assert got.isfinite().all()


# a tile for the interpreter: 32 is what an instruction of FP8 sums
TILE = Tile(32, 16, 32, 4, 2)
AROUND = {
    "rounding": ("rounding",),
    "rounding, bias": ("rounding", "bias"),
    "rounding, bias, residual": ("rounding", "bias", "residual"),
    "residual": ("residual",),
    "bias, gate": ("bias", "gate"),
    "rounding, bias, gate": ("rounding", "bias", "gate"),
    "bias, gate, then": ("bias", "gate", "then"),
    "rounding, residual, then": ("rounding", "residual", "then"),
}


def problem(shape, around, dtype):
    """Draws what an FP8 layer takes; of what it rounds, values that e4m3 holds and some beyond its range."""
    *rows, in_features, out_features = shape
    step, scale = (torch.tensor(factor, device=DEVICE) for factor in (0.25, 0.0123 / in_features**0.5))
    x = (30 * torch.randn(*rows, in_features)).to(E4M3)
    if "rounding" in around:
        x = x.to(dtype) * 0.25
        x.view(-1)[:2] = torch.tensor([1e4, -1e4])
    weight = (30 * torch.randn(2 * out_features if "gate" in around else out_features, in_features)).to(E4M3)
    bias = torch.randn(len(weight)).to(DEVICE, dtype) if "bias" in around else None
    residual = torch.randn(*rows, out_features).to(DEVICE, dtype) if "residual" in around else None
    then = torch.tensor(2.0**-6, device=DEVICE) if "then" in around else None
    return Fp8LinearProblem(x.to(DEVICE), weight.to(DEVICE), step, scale, bias, residual, "gate" in around, then, dtype)


def wide(given):
    """The same problem in float64, its result not rounded."""
    bias, residual = (None if tensor is None else tensor.double() for tensor in (given.bias, given.residual))
    x = given.x.double() if given.rounds else given.x
    return linear_e4m3_ref(given._replace(x=x, bias=bias, residual=residual, then=None, dtype=torch.float64))


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 24, 64, 48), pytest.param((1, 7, 48, 16), marks=pytest.mark.slow), (3, 17, 40, 24), (5, 6, 3)], ids=str
)
def test_linear_e4m3(shape, dtype, around):
    given = problem(shape, AROUND[around], dtype)
    got, eager, exact = fp8_linear.linear_e4m3_triton(given, TILE), linear_e4m3_ref(given), wide(given)
    if given.then is None:
        assert_as_accurate(got, eager, exact, SLACK.get(dtype, 0.0))
    else:
        assert (got.shape, got.dtype) == (eager.shape, E4M3)
        values = (exact / given.then).float()
        assert_rounded(got.float(), values.clamp(-LARGEST, LARGEST).to(E4M3).float(), values, strays=0.02)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_e4m3_does_not_hold_is_rounded_on_the_way(dtype):
    x = (6 * torch.randn(50, 96)).to(DEVICE, dtype)
    given = problem((50, 96, 32), ("bias", "residual"), dtype)._replace(x=x)
    got = fp8_linear.linear_e4m3_triton(given, TILE)
    # as the kernel that rounds alone does, in the interpreter's way too
    apart = given._replace(x=to_e4m3(x, given.step))
    assert_as_accurate(got, linear_e4m3_ref(apart), wide(apart), SLACK.get(dtype, 0.0))
    exact = x.double() @ (given.weight.double() * given.scale).T + given.bias + given.residual
    assert relative_error(got, exact) < 2 * ROUNDING


SMALL_TILES = sorted({t for arch in ARCHITECTURES for gate in (0, 1) for t in fp8_linear.tiles(arch, False, bool(gate))})


@pytest.mark.parametrize(
    "tile", [pytest.param(tile, id=str(tile), marks=pytest.mark.slow if i else ()) for i, tile in enumerate(SMALL_TILES)]
)
def test_linear_e4m3_tiles_cover_everything_once(tile):
    """More blocks of rows than one group, the last group short, at the launch table's own tiles."""
    given = problem((1300, 80, 72), ("rounding", "bias", "residual"), torch.float16)
    assert_as_accurate(fp8_linear.linear_e4m3_triton(given, tile), linear_e4m3_ref(given), wide(given))


TRIED = ("PyTorch", "Triton, 128x128x128")


@pytest.mark.parametrize("best", TRIED)
def test_every_candidate_computes_the_layer(best):
    given = problem((4, 32, 16), ("rounding", "bias", "residual"), torch.float16)
    assert given.case == f"linear_e4m3 4x32 by 16, rounding, bias, residual, float16 on {given.x.device}"
    found = candidates(given, 90)
    assert tuple(found) == TRIED
    assert_as_accurate(found[best](), linear_e4m3_ref(given), wide(given))


@pytest.mark.parametrize(("around", "many"), [(("bias",), 1), (("bias", "gate"), 3), (("rounding",), 3)], ids=str)
def test_where_nothing_is_spared_the_product_is_pytorchs_alone(around, many):
    found = tuple(candidates(problem((3, 32, 16), around, torch.float16), 90))
    assert found[0] == "PyTorch"
    assert len(found) == many


@torch.inference_mode()
def test_layers_of_a_network_are_the_same_by_triton_and_by_pytorch(monkeypatch):
    """A feed-forward with its norm, and a 1x1 convolution of channels-last images: strides, gates and widths as they come."""
    block, conv = FeedForward(32).to(DEVICE, torch.float16), nn.Conv2d(32, 48, 1).to(DEVICE, torch.float16)
    norm, x = RowNorm(32).to(DEVICE, torch.float16).given(), torch.randn(2, 5, 3, 32).to(DEVICE, torch.float16)
    exact = block(x, norm), conv(x.movedim(-1, 1))
    fp8.convert(block, {"net.0.proj": 4.0, "net.2": 2.0})
    pointwise, calls = fp8.Fp8Pointwise(conv, 4.0), []

    def by_triton(given):
        calls.append(given.x.dtype)
        return fp8_linear.linear_e4m3_triton(given, TILE)

    by_pytorch = block(x, norm), pointwise(x.movedim(-1, 1))
    monkeypatch.setattr(op, "unfused", by_triton)
    monkeypatch.setattr(op, "candidates", lambda given, arch: {"Triton": lambda: by_triton(given)})
    ours = block(x, norm), pointwise(x.movedim(-1, 1))
    assert calls == [E4M3, E4M3, torch.float16]
    assert ours[1].is_contiguous(memory_format=torch.channels_last)
    for got, other, wide in zip(ours, by_pytorch, exact, strict=True):
        assert got.shape == wide.shape
        assert relative_error(got, other) < ROUNDING / 4
        assert relative_error(got, wide) < ROUNDING


def test_a_gpu_without_e4m3_is_refused():
    with pytest.raises(ValueError, match=r"FP8 needs compute capability 8\.9 or newer, got 8\.6"):
        fp8_linear.tiles(86, False, False)
