"""The op's meaning and its registration, on the CPU: golden numbers, gradients, export, properties and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden.load_golden import Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from support.accuracy import relative_error
from vstar_engine.kernels import temporal_attention as module
from vstar_engine.kernels.temporal_attention import (
    MAX_FRAMES,
    temporal_attention,
    temporal_attention_dense,
    temporal_attention_probs,
    temporal_attention_ref,
    toeplitz_bias,
)
from vstar_engine.machine.memory import LiveBytes
from vstar_engine.sampling.tar import toeplitz

GOLDEN = Golden(str(Path(__file__).parents[1] / "golden"))
OPS = {"toeplitz": torch.ops.vstar.temporal_attention.default, "dense": torch.ops.vstar.temporal_attention_dense.default}


def draw(
    frames: int = 5,
    keys: int | None = None,
    batch: int = 2,
    positions: int = 3,
    heads: int = 2,
    head_dim: int = 8,
    **options: Any,
):
    """Draws q, k, v as views of one fused projection, and g for each batch item."""
    qkv = torch.randn(batch, max(frames, keys or 0), positions, 3, heads, head_dim, **options)
    q, k, v = qkv.unbind(3)
    return q[:, :frames], k[:, : keys or frames], v[:, : keys or frames], torch.randn(batch, frames)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- meaning ---


CASES = GOLDEN.cases("tar_attention") + GOLDEN.cases("tar_attention_generated")


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_golden(case):
    config, stored = case["config"], {name: torch.from_numpy(x) for name, x in GOLDEN.inputs(case).items()}
    chosen = stored.get("pos", torch.arange(config["positions"]))
    # (positions, frames, heads * head_dim) -> (1, frames, positions, heads, head_dim)
    heads = (config["heads"], config["dim_head"])
    q, k, v = (stored[name][chosen].unflatten(-1, heads).transpose(0, 1)[None] for name in "qkv")
    g = torch.zeros(q.shape[1])
    if config["regularised"]:
        g = toeplitz(q.shape[1], config["std"], config["scale"])
    out = temporal_attention(q, k, v, g)[0].transpose(0, 1).flatten(-2)
    probe = case.get("rounding_probe", {}).get("rel_l2")
    bar = min(1e-4, max(1e-5, 20 * probe)) if probe else 1e-5
    assert relative_error(out, stored["out"]) <= bar
    if "probs" in stored:
        # (positions * heads, frames, frames) -> head mean
        mean = stored["probs"].unflatten(0, (-1, config["heads"])).mean(1)
        assert relative_error(temporal_attention_probs(q, k, g, list(range(len(chosen))))[0], mean) <= bar


def one_row_at_a_time(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The definition in float64 loops, for one batch item, position and head: (T, D), (Tk, D), (Tk, D), (T, Tk)."""
    rows = []
    for i in range(len(q)):
        phi = torch.stack([(q[i] * key).sum() / len(key) ** 0.5 for key in k])
        weights = torch.exp(phi + phi.max() * bias[i])
        rows.append((weights / weights.sum()) @ v)
    return torch.stack(rows)


@pytest.mark.parametrize(("frames", "keys"), [(1, 1), (5, 5), (5, 9), (9, 5)])
def test_definition(frames, keys):
    q, k, v, g = draw(frames, keys, dtype=torch.float64)
    G = torch.randn(1, frames, keys)
    for out, bias in ((temporal_attention(q, k, v, g), None), (temporal_attention_dense(q, k, v, G), G[0])):
        for b, p, h in ((0, 0, 0), (1, 2, 1)):
            spelled = torch.zeros(frames, keys)
            for i in range(frames):
                for j in range(min(frames, keys)):
                    spelled[i, j] = g[b, abs(i - j)]
            expected = one_row_at_a_time(
                q[b, :, p, h], k[b, :, p, h], v[b, :, p, h], (spelled if bias is None else bias).double()
            )
            torch.testing.assert_close(out[b, :, p, h], expected)


@pytest.fixture
def logits_bytes(monkeypatch):
    """A call that bounds what the logits of one run of positions may take."""
    return lambda most: monkeypatch.setattr(module, "LOGITS_BYTES", most)


def test_runs_of_positions_equal_one_run(logits_bytes):
    q, k, v, g = draw(positions=7)
    whole = temporal_attention(q, k, v, g), temporal_attention_probs(q, k, g, [6, 0, 3])
    logits_bytes(2 * 4 * 2 * 2 * 25)
    torch.testing.assert_close(temporal_attention(q, k, v, g), whole[0])
    torch.testing.assert_close(temporal_attention_probs(q, k, g, torch.tensor([6, 0, 3])), whole[1])


@pytest.mark.parametrize("frames", [16, 64, 256, 512])
def test_memory_grows_with_frames_not_their_square(frames, logits_bytes):
    # one position's logits at 512 frames
    logits_bytes(2 * 4 * 512 * 512)
    q, k, v, g = draw(frames, batch=1, positions=64, head_dim=16)
    with LiveBytes() as memory:
        module._by_positions(q, k, v, toeplitz_bias(g, frames, frames))
    assert memory.peak <= 5 * module.LOGITS_BYTES + 2 * q.numel() * q.element_size()


def test_probs_memory_is_its_result_and_a_bounded_rest(logits_bytes):
    logits_bytes(4 * 64 * 64)
    q, k, _, g = draw(64, batch=1, positions=40, heads=8)
    with LiveBytes() as memory:
        out = temporal_attention_probs(q, k, g, list(range(40)))
    assert memory.peak <= out.nbytes + 8 * module.LOGITS_BYTES + q.numel() * q.element_size()


# --- registration ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", OPS)
def test_opcheck(kind, dtype):
    q, k, v, g = draw(5, 7, dtype=dtype)
    bias = g if kind == "toeplitz" else torch.randn(1, 5, 7)
    leaves = [x.detach().requires_grad_(dtype == torch.float32) for x in (q, k, v)]
    torch.library.opcheck(OPS[kind], (*leaves, bias))


@pytest.mark.parametrize("kind", OPS)
def test_fake_kernel_agrees(kind):
    q, k, v, g = draw(5, 7)
    inputs = (q, k, v, g if kind == "toeplitz" else torch.randn(1, 5, 7))
    real = OPS[kind](*inputs)
    with FakeTensorMode() as mode:
        fake = OPS[kind](*(mode.from_tensor(x) for x in inputs))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    assert real.is_contiguous()


@pytest.mark.parametrize("kind", OPS)
def test_gradients(kind):
    q, k, v, g = draw(4, 6, batch=1, positions=2, heads=1, head_dim=3, dtype=torch.float64)
    bias = g if kind == "toeplitz" else torch.randn(1, 4, 6)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda q, k, v: OPS[kind](q, k, v, bias), leaves)


class Attend(torch.nn.Module):
    def forward(self, qkv: Tensor, g: Tensor) -> Tensor:
        q, k, v = qkv.unbind(3)
        return temporal_attention(q, k, v, g) * 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_once_for_every_number_of_frames(backend):
    compiled = torch.compile(Attend(), fullgraph=True, dynamic=True, backend=backend)
    for index, frames in enumerate((6, 9, 16, 31)):
        qkv, g = torch.randn(2, frames, 3, 3, 2, 8), torch.randn(1, frames)
        with torch.compiler.set_stance("default" if index == 0 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(qkv, g), Attend()(qkv, g))


def test_exports_with_dynamic_frames():
    dim = torch.export.Dim("frames", min=2, max=256)
    example = torch.randn(2, 6, 3, 3, 2, 8), torch.randn(1, 6)
    program = torch.export.export(Attend(), example, dynamic_shapes=({1: dim}, {1: dim}))
    for frames in (2, 33):
        inputs = torch.randn(2, frames, 3, 3, 2, 8), torch.randn(1, frames)
        torch.testing.assert_close(program.module()(*inputs), Attend()(*inputs))


# --- refusals ---


def long(frames: int) -> tuple[Tensor, ...]:
    x = torch.zeros(1, 1, 1, 1, 8).expand(1, frames, 1, 1, 8)
    return x, x, x, torch.zeros(1, frames)


q, k, v, g = draw()
BAD = {
    "rank": ((q[0], k, v, g), r"must be \(B, T, P, heads, head_dim\)"),
    "positions": ((q[:, :, :2], k, v, g), "must agree but for the frames"),
    "keys and values": ((q, k, v[:, :4], g), "must agree but for the frames"),
    "dtypes": ((q, k.half(), v, g), "must share one dtype"),
    "integers": ((q.int(), k.int(), v.int(), g), "must share one dtype"),
    "devices": ((q, k.to("meta"), v, g), "must be on one device"),
    "last stride": ((q.mT.contiguous().mT, k, v, g), "last stride of q, k, v must be 1"),
    "no frames": ((q[:, :0], k, v, g[:, :0]), "must not be empty"),
    "no head_dim": ((q[..., :0], k[..., :0], v[..., :0], g), "must not be empty"),
    "too many frames": (long(MAX_FRAMES + 1), "at most 4096 frames, got 4097"),
    "too wide a head": (draw(head_dim=136), "head width of q, k, v must be at most 128, got 136"),
    "g's length": ((q, k, v, g[:, :4]), r"g must be \(1 or 2, 5\), got \(2, 4\)"),
    "g's batch": ((q, k, v, torch.zeros(3, 5)), r"g must be \(1 or 2, 5\), got \(3, 5\)"),
    "g's rank": ((q, k, v, g[..., None]), r"g must be \(1 or 2, 5\)"),
    "g's dtype": ((q, k, v, g.double()), "g must be float32, got torch.float64"),
    "g's device": ((q, k, v, g.to("meta")), "must be on one device"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_value_error(bad):
    inputs, sentence = BAD[bad]
    with pytest.raises(ValueError, match=sentence):
        OPS["toeplitz"](*inputs)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=sentence):
        OPS["toeplitz"](*(mode.from_tensor(x) for x in inputs))


BAD_MATRIX = {
    "keys": torch.zeros(1, 5, 4),
    "batch": torch.zeros(3, 5, 5),
    "rank": torch.zeros(5, 5),
    "dtype": torch.zeros(1, 5, 5).half(),
}


@pytest.mark.parametrize("bad", BAD_MATRIX)
def test_bad_matrix_is_one_value_error(bad):
    G = BAD_MATRIX[bad]
    with pytest.raises(ValueError, match="G must be"):
        OPS["dense"](q, k, v, G)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match="G must be"):
        OPS["dense"](*(mode.from_tensor(x) for x in (q, k, v, G)))


# --- properties ---

SEEDS = st.integers(0, 2**32 - 1)
FRAMES = st.integers(1, 40)
quick = settings(max_examples=25, deadline=None)


@quick
@given(SEEDS, FRAMES)
def test_permuting_positions_permutes_outputs(seed, frames):
    torch.manual_seed(seed)
    q, k, v, g = draw(frames, positions=6)
    order = torch.randperm(6)
    permuted = temporal_attention(q[:, :, order], k[:, :, order], v[:, :, order], g)
    torch.testing.assert_close(permuted, temporal_attention(q, k, v, g)[:, :, order])


@quick
@given(SEEDS, FRAMES)
def test_without_a_bias_it_is_plain_attention(seed, frames):
    torch.manual_seed(seed)
    q, k, v, _ = draw(frames)
    plain = torch.nn.functional.scaled_dot_product_attention(*(x.permute(0, 2, 3, 1, 4) for x in (q, k, v)))
    out = temporal_attention(q, k, v, torch.zeros(frames))
    torch.testing.assert_close(out, plain.permute(0, 3, 1, 2, 4), atol=1e-5, rtol=1e-4)


@quick
@given(SEEDS, st.integers(2, 40), st.floats(0.05, 0.3))
def test_strength_keeps_a_frame_to_itself_or_away_by_the_sign_of_its_row_maximum(seed, frames, sigma):
    torch.manual_seed(seed)
    # every logit has the same sign: q and k are positive, or one is negated
    q, k = (torch.rand(1, frames, 2, 2, 8) + 0.5 for _ in range(2))
    g = toeplitz(frames, sigma, strength=200.0)
    identity = torch.eye(frames).expand(1, 2, frames, frames)
    torch.testing.assert_close(temporal_attention_probs(q, k, g, [0, 1]), identity, atol=1e-6, rtol=0)
    away = temporal_attention_probs(-q, k, g, [0, 1]).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(away, torch.zeros_like(away), atol=1e-6, rtol=0)


@quick
@given(SEEDS, FRAMES, st.floats(0.1, 10.0))
def test_scaling_q_scales_the_row_maximum(seed, frames, factor):
    torch.manual_seed(seed)
    q, k, v, g = draw(frames, dtype=torch.float64)
    phi = q.permute(0, 2, 3, 1, 4) @ k.permute(0, 2, 3, 4, 1) * q.shape[-1] ** -0.5
    biased = factor * (phi + phi.amax(-1, keepdim=True) * toeplitz_bias(g.double(), frames, frames)[:, None, None])
    expected = (biased.softmax(-1) @ v.permute(0, 2, 3, 1, 4)).permute(0, 3, 1, 2, 4)
    torch.testing.assert_close(temporal_attention(factor * q, k, v, g), expected)


@quick
@given(SEEDS, FRAMES)
def test_nan_in_q_stays_in_its_row(seed, frames):
    torch.manual_seed(seed)
    q, k, v, g = draw(frames)
    q[1, frames - 1, 2, 1, 0] = float("nan")
    lost = temporal_attention(q, k, v, g).isnan()
    assert lost[1, frames - 1, 2, 1].all()
    assert lost.sum() == q.shape[-1]


def test_strided_bias_and_one_for_all():
    q, k, v, g = draw()
    strided = torch.stack([g, g, g], dim=-1)[..., 1]
    torch.testing.assert_close(temporal_attention(q, k, v, strided), temporal_attention_ref(q, k, v, g))
    torch.testing.assert_close(temporal_attention(q, k, v, g[0]), temporal_attention(q, k, v, g[:1].expand(2, -1)))
