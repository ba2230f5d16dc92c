"""The fused ops on a CPU beyond the op table: edges, layouts, threads, gradients and what they refuse."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.accuracy import assert_as_accurate
from vstar_engine.kernels.cpu import library
from vstar_engine.kernels.geglu import geglu, geglu_ref
from vstar_engine.kernels.groupnorm_silu import groupnorm_silu, groupnorm_silu_ref
from vstar_engine.kernels.linear import feed_forward, linear, linear_ref
from vstar_engine.kernels.problems import LayerNorm, LinearProblem
from vstar_engine.networks.layers import FeedForward, RowNorm

pytestmark = pytest.mark.usefixtures("poisoned_memory")
PRESENT, WHY = library.status()
ISAS = library._load().isas if PRESENT else ()


def normal(*shape, dtype=torch.float32):
    """A tensor (N, C, ...) in channels-last memory, its mean beside zero."""
    return (3 * torch.randn(shape) + 5).to(dtype).movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.fixture(params=ISAS or [None])
def isa(request, monkeypatch):
    if request.param is None:
        pytest.skip(WHY)
    monkeypatch.setenv("VSTAR_CPU_ISA", request.param)


@pytest.mark.usefixtures("isa")
def test_geglu_of_every_gate():
    """The whole range, tails too: each value to a few steps of float32."""
    gate = torch.cat([torch.linspace(-14, 14, 20001), torch.tensor([-1e30, 1e30, 0.0, -0.0])])
    got, exact = geglu(torch.stack([torch.ones_like(gate), gate], -1))[:, 0].double(), torch.nn.functional.gelu(gate.double())
    inside = gate.abs() < 5
    assert float(((got - exact) / exact.abs().clamp(min=1e-30))[inside].abs().max()) < 2e-6
    assert float((got - exact)[~inside].abs().div(exact[~inside].abs().clamp(min=1.0)).max()) < 1e-7


@pytest.mark.usefixtures("isa")
def test_not_a_number_stays_in_its_place():
    x = torch.randn(4, 32)
    x[1, 3] = x[2, 16 + 5] = torch.nan
    assert torch.equal(geglu(x).isnan(), geglu_ref(x).isnan())
    hidden = normal(2, 8, 4, 4)
    hidden[1, 2, 0, 0] = torch.nan
    norm = (4, torch.ones(8), torch.zeros(8), 1e-5)
    assert torch.equal(groupnorm_silu(hidden, *norm).isnan(), groupnorm_silu_ref(hidden, *norm).isnan())


def feed_forward_ref(x, first, second, norm):
    hidden = linear_ref(LinearProblem(x, *first, None, True, *norm))
    return linear_ref(LinearProblem(hidden, *second, x))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(2, 1700, 32, 128), (3, 129, 20, 37), (1, 3, 64, 256), (1, 2, 300, 700)], ids=str)
@torch.no_grad()
def test_feed_forward(shape, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    items, rows, width, inner = shape
    x, norm = 3 + torch.randn(items, rows, width), LayerNorm(1 + torch.rand(width), torch.randn(width), 1e-5)
    first = torch.randn(2 * inner, width) / width**0.5, torch.randn(2 * inner)
    second = torch.randn(width, inner) / inner**0.5, torch.randn(width)
    wide = [tuple(tensor.double() for tensor in pair) for pair in (first, second)]
    exact = feed_forward_ref(x.double(), *wide, LayerNorm(norm.weight.double(), norm.bias.double(), norm.eps))
    got = feed_forward(x, first, second, norm)
    assert got.is_contiguous()
    assert_as_accurate(got, feed_forward_ref(x, first, second, norm), exact)
    across = x.transpose(0, 1)
    assert torch.equal(feed_forward(across, first, second, norm), got.transpose(0, 1))


class Names(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not PRESENT, reason=WHY)
@torch.no_grad()
def test_who_looks_on_sees_the_ops():
    """What goes past the dispatcher otherwise gives the same; a hook on a layer inside is called."""
    block, norm, x = FeedForward(16), RowNorm(16).given(), torch.randn(2, 5, 16)
    alone = block(x, norm)
    with Names() as names:
        watched = block(x, norm)
    assert names.seen.count("vstar::linear") == 2
    torch.testing.assert_close(watched, alone)
    widths = []
    block.net[2].register_forward_pre_hook(lambda layer, given: widths.append(given[0].shape[-1]))
    torch.testing.assert_close(block(x, norm), alone)
    assert widths == [64]


@pytest.mark.skipif(not PRESENT, reason=WHY)
@torch.no_grad()
def test_linear_takes_any_strides():
    wide, weight = torch.randn(3, 5, 64), torch.randn(8, 32)
    across = torch.randn(8, 5, 3).permute(2, 1, 0)
    for given in (
        LinearProblem(wide[..., ::2], weight, None),
        LinearProblem(wide[..., :32], weight, None, across),
        LinearProblem(wide[..., :32], weight.T.contiguous().T, None),
    ):
        torch.testing.assert_close(linear(given), linear_ref(given))


def test_linear_with_gradients_is_pytorchs():
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(4, 8)
    linear(LinearProblem(x, weight, None, gate=True)).sum().backward()
    assert x.grad is not None


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_rows(threads):
    x, norm = normal(2, 32, 16, 999), (8, torch.ones(32), torch.zeros(32), 1e-6)
    gated, weight = torch.randn(1001, 640), torch.randn(320, 640)

    def compute():
        with torch.no_grad():
            return groupnorm_silu(x, *norm), geglu(gated), linear(LinearProblem(gated, weight, None, gate=True))

    one = compute()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shared = compute()
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(shared[0], one[0], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(*pair) for pair in zip(shared[1:], one[1:], strict=True))


@pytest.mark.skipif(not PRESENT, reason=WHY)
def test_a_mean_far_from_zero_does_not_cancel():
    """E[x^2] - E[x]^2 in float32 would leave nothing of a spread of 1 beside a mean of 10,000."""
    x = (torch.randn(1, 4, 64, 64) + 1e4).contiguous(memory_format=torch.channels_last)
    norm = (2, torch.ones(4), torch.zeros(4), 1e-5)
    exact = groupnorm_silu_ref(x.double(), 2, torch.ones(4).double(), torch.zeros(4).double(), 1e-5)
    torch.testing.assert_close(groupnorm_silu(x, *norm).double(), exact, rtol=0, atol=2e-3)


def test_other_layouts_keep_theirs():
    x, norm = torch.randn(2, 8, 5, 6), (4, torch.randn(8), torch.randn(8), 1e-5)
    got = groupnorm_silu(x, *norm)
    assert got.is_contiguous()
    torch.testing.assert_close(got, groupnorm_silu_ref(x, *norm))
    spread = torch.randn(3, 7, 20)[..., ::2]
    torch.testing.assert_close(geglu(spread), geglu_ref(spread))


def test_gradients_are_the_definitions():
    x, weight, bias = normal(2, 4, 3, 3).double(), *torch.randn(2, 4).double()
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda x, weight, bias: groupnorm_silu(x, 2, weight, bias, 1e-5), leaves)
    assert torch.autograd.gradcheck(geglu, torch.randn(3, 8, dtype=torch.float64, requires_grad=True))


def test_the_ops_are_registered_as_torch_expects():
    norm = (normal(2, 8, 3, 4), 4, torch.ones(8), torch.zeros(8), 1e-5, True)
    for op, arguments in ((torch.ops.vstar.groupnorm_silu, norm), (torch.ops.vstar.geglu, (torch.randn(3, 8),))):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_a_compiler_sees_standard_operators():
    class Net(torch.nn.Module):
        def forward(self, x):
            return geglu(groupnorm_silu(x, 2, torch.ones(4), torch.zeros(4), 1e-5))

    graph = torch.export.export(Net(), (torch.randn(2, 4, 3, 6),)).graph
    assert not [node for node in graph.nodes if "vstar" in str(node.target)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: geglu(torch.zeros(3, 5)), r"values then gates, and not empty, got \(3, 5\)"),
        (lambda: geglu(torch.zeros(0, 4)), r"not empty, got \(0, 4\)"),
        (
            lambda: torch.ops.vstar.linear(torch.ones(2, 6), torch.ones(3, 5), None, None, False, None, None, 0.0),
            r"x must be \(..., 5\), got \(2, 6\)",
        ),
        (
            lambda: feed_forward(
                torch.ones(2, 6), (torch.ones(8, 6), None), (torch.ones(6, 5), None), LayerNorm(torch.ones(6), torch.ones(6), 0)
            ),
            r"must be \(..., width\), \(2 \* inner, width\), \(width, inner\), got \(2, 6\), \(8, 6\), \(6, 5\)",
        ),
        (
            lambda: groupnorm_silu(torch.zeros(2, 6, 3), 4, torch.ones(6), torch.ones(6), 1e-5),
            "groups must divide the 6 channels, got 4",
        ),
        (lambda: groupnorm_silu(torch.zeros(2, 6, 3), 3, torch.ones(5), torch.ones(6), 1e-5), r"must be \(6,\), got \(5,\)"),
        (
            lambda: groupnorm_silu(torch.zeros(6), 3, torch.ones(6), torch.ones(6), 1e-5),
            r"\(N, C, ...\) and not empty, got \(6,\)",
        ),
    ],
    ids=["odd", "empty", "features", "feed-forward", "groups", "weight", "rank"],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
