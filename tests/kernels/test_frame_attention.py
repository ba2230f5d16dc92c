"""Frame attention's meaning and its registration, on the CPU: the rule token by token, paths, export and refusals."""

import math

import pytest
import torch

from support.accuracy import assert_as_accurate
from vstar_engine.kernels import frame_attention as module
from vstar_engine.kernels.frame_attention import frame_attention, frame_attention_ref
from vstar_engine.kernels.problems import FrameTables

FRAMES, TOKENS = 5, 3


def draw(frames=FRAMES, tokens=TOKENS, head_dim=8, dtype=torch.float32, heads=2):
    """Draws q, k, v as views of one fused projection."""
    torch.manual_seed(0)
    return torch.randn(2, frames * tokens, 3, heads, head_dim).to(dtype).unbind(2)


def rules(frames=FRAMES):
    torch.manual_seed(1)
    b = torch.randn(frames, frames)
    b[0, frames // 2 + 1 :] = -math.inf
    a, g = torch.rand(frames) + 0.5, torch.randn(frames)
    one = torch.zeros(frames, frames)
    one[1:, 0] = math.log(0.6)
    return {
        "plain": FrameTables(),
        "one_column": FrameTables(b=one),
        "bias": FrameTables(b=b),
        "rowmax": FrameTables(g=g),
        "decay": FrameTables(b=b, decay=0.9, beyond=4),
        "all": FrameTables(a, g, b, 0.7, 4),
    }


def by_token(q, k, v, tables, tokens):
    """The rule for one token and head at a time, in float64."""
    out = torch.empty_like(q, dtype=torch.float64)
    q, k, v = q.double(), k.double(), v.double()
    for batch, i, head in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        s = k[batch, :, head] @ q[batch, i, head] / math.sqrt(q.shape[-1])
        pairs = [(i // tokens, j // tokens) for j in range(len(s))]
        added = torch.tensor([0.0 if tables.b is None else float(tables.b[pair]) for pair in pairs], dtype=torch.float64)
        top = max(float(value) for value, bias in zip(s, added, strict=True) if bias > -math.inf)
        for j, (f_q, f_k) in enumerate(pairs):
            distance, value = abs(f_q - f_k), float(s[j])
            if tables.beyond >= 0 and abs(i - j) > tables.beyond and value > 0:
                value *= tables.decay
            value *= 1.0 if tables.a is None else float(tables.a[distance])
            s[j] = value + (0.0 if tables.g is None else float(tables.g[distance]) * top) + added[j]
        out[batch, i, head] = s.softmax(0) @ v[batch, :, head]
    return out


@pytest.mark.parametrize("name", rules())
def test_the_definition(name, poisoned_memory):
    tables, (q, k, v) = rules()[name], draw()
    exact = by_token(q, k, v, tables, TOKENS)
    torch.testing.assert_close(frame_attention_ref(q.double(), k.double(), v.double(), tables, TOKENS), exact)
    assert_as_accurate(frame_attention(q, k, v, tables, TOKENS), frame_attention_ref(q, k, v, tables, TOKENS), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["one_column", "all"])
def test_half_precision(name, dtype):
    tables, (q, k, v) = rules()[name], draw(dtype=dtype)
    exact = frame_attention_ref(q.double(), k.double(), v.double(), tables, TOKENS)
    assert_as_accurate(frame_attention(q, k, v, tables, TOKENS), frame_attention_ref(q, k, v, tables, TOKENS), exact)


def test_blocks_of_rows_are_the_whole(monkeypatch):
    """A clip whose logits outgrow the limit is computed in runs of query rows."""
    tables, (q, k, v) = rules()["all"], draw()
    whole = frame_attention(q, k, v, tables, TOKENS)
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 2 * 2 * q.shape[1] * 2)
    torch.testing.assert_close(frame_attention(q, k, v, tables, TOKENS), whole)


def test_registration():
    op, tables = torch.ops.vstar.frame_attention.default, rules()["all"]
    torch.library.opcheck(op, (*draw(), *tables, TOKENS), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(frame_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*draw(), tables, TOKENS), frame_attention(*draw(), tables, TOKENS))


def test_refusals():
    q, k, v = draw()
    for change, match in (
        ({"tokens": 4}, "the 15 tokens must be whole frames"),
        ({"k": k[:, :3]}, r"must be \(B, N, heads, head_dim\)"),
        ({"v": v.half()}, "must share one dtype"),
        ({"tables": FrameTables(b=torch.zeros(3, 3))}, r"b must be float32 \(5, 5\)"),
        ({"tables": FrameTables(g=torch.zeros(5, dtype=torch.float64))}, r"g must be float32 \(5,\)"),
        ({"tables": FrameTables(decay=math.nan, beyond=1)}, "decay must be a finite number"),
    ):
        with pytest.raises(ValueError, match=match):
            frame_attention(**{"q": q, "k": k, "v": v, "tables": FrameTables(), "tokens": TOKENS, **change})
    wide = torch.randn(1, 4, 1, 256)
    with pytest.raises(ValueError, match="at most 128, got 256"):
        frame_attention(wide, wide, wide, FrameTables(), 2)
