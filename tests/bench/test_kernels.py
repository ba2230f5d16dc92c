"""`bench kernels`: every provider of an op computes the same thing, in every layout, and a planted fault is caught."""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

from vstar_engine.bench.__main__ import main
from vstar_engine.bench.commands import kernels
from vstar_engine.bench.commands.kernels import ERROR_BUDGET, attention_shape, error
from vstar_engine.bench.commands.report import rendered
from vstar_engine.bench.harness.contest import Contest, NotHere, observed
from vstar_engine.bench.harness.random_networks import seeded
from vstar_engine.bench.harness.rows import ABSENT, OK, SKIPPED, WRONG, read
from vstar_engine.bench.harness.timing import seconds_of_short
from vstar_engine.bench.ops import attention_providers, fp8_providers, op_providers, temporal_transformer
from vstar_engine.bench.ops.attention_providers import COMPILED, FLEX, OURS, PROVIDERS, XFORMERS, Problem
from vstar_engine.bench.ops.op_cases import OpSite
from vstar_engine.config.models import MODELS
from vstar_engine.kernels.temporal_attention import temporal_attention_dense_ref, temporal_attention_ref
from vstar_engine.networks.blocks import TemporalTransformer

CPU = torch.device("cpu")


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


EAGER = [name for name in PROVIDERS if name not in (COMPILED, FLEX, XFORMERS)]
FULL = MODELS["videocrafter2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", attention_providers.LAYOUTS)
@pytest.mark.parametrize("name", EAGER)
@torch.no_grad()
def test_providers_agree_with_float64(name: str, layout: str, dtype: torch.dtype) -> None:
    problem = Problem.random((2, 7, 5, 3, 16), dtype, CPU, layout, sigma=2.0)
    assert problem.q.shape == (2, 7, 5, 3, 16)
    answer = PROVIDERS[name].prepare(problem)()
    plain = {name} if PROVIDERS[name].plain else set()
    assert error(problem, plain, name, answer) <= ERROR_BUDGET[dtype]
    assert error(problem, {name} - plain, name, answer) > 2 * ERROR_BUDGET[dtype]


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", attention_providers.LAYOUTS)
@torch.no_grad()
def test_compiled_agrees_with_float64(layout: str, compiler: str) -> None:
    problem = Problem.random((1, 16, 5, 3, 16), torch.float32, CPU, layout, sigma=2.0, compiler=compiler)
    assert error(problem, set(), COMPILED, PROVIDERS[COMPILED].prepare(problem)()) <= ERROR_BUDGET[torch.float32]


@torch.no_grad()
def test_two_passes_of_flex_attention_make_the_regulariser(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU FlexAttention gives no row maxima, so here all of it is written out, on a problem that says it is a GPU's."""
    problem = Problem.random((1, 6, 2, 2, 8), torch.float32, CPU, "fused", sigma=2.0)

    def attend(q: Tensor, k: Tensor, v: Tensor, score_mod: Callable | None = None, return_aux: object = None) -> object:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if score_mod is None:
            assert return_aux.max_scores
            return None, SimpleNamespace(max_scores=scores.amax(dim=-1))
        places = torch.meshgrid(*(torch.arange(size) for size in scores.shape), indexing="ij")
        return score_mod(scores, *places).softmax(dim=-1) @ v

    with pytest.raises(NotHere, match="no row maxima on a CPU"):
        PROVIDERS[FLEX].prepare(problem)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: attend)
    elsewhere = replace(problem, q=OnGpu(problem.q))
    assert error(problem, set(), FLEX, PROVIDERS[FLEX].prepare(elsewhere)()) <= ERROR_BUDGET[torch.float32]


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: object = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """A stand-in for xformers': its signature, layout (B, M, H, K), and what it refuses of a bias (B, H, Mq, Mkv)."""
    batch, frames, heads, width = query.shape
    assert attn_bias.shape == (batch, heads, frames, key.shape[1])
    assert attn_bias.dtype == query.dtype
    assert all(stride % (16 // attn_bias.itemsize) == 0 for stride in attn_bias.stride()[:-1])
    assert attn_bias.stride(-1) == 1
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = q @ k.mT * (width**-0.5 if scale is None else scale) + attn_bias
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", attention_providers.LAYOUTS)
@pytest.mark.parametrize("frames", [6, 16])
@torch.no_grad()
def test_a_dense_bias_through_xformers_makes_the_regulariser(
    frames: int, layout: str, dtype: torch.dtype, modules: Callable
) -> None:
    stand_in = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    modules({"xformers": SimpleNamespace(ops=stand_in), "xformers.ops": stand_in})
    problem = Problem.random((2, frames, 3, 2, 8), dtype, CPU, layout, sigma=2.0)
    answer = PROVIDERS[XFORMERS].prepare(problem)()
    assert error(problem, set(), XFORMERS, answer) <= ERROR_BUDGET[dtype]
    assert error(problem, {XFORMERS}, XFORMERS, answer) > 2 * ERROR_BUDGET[dtype]


def test_split_heads_lie_one_after_another() -> None:
    split = Problem.random((2, 7, 5, 3, 16), torch.float32, CPU, "split", 1.0)
    fused = Problem.random((2, 7, 5, 3, 16), torch.float32, CPU, "fused", 1.0)
    assert attention_providers.split_heads(split.q).data_ptr() == split.q.data_ptr()
    assert attention_providers.split_heads(fused.q).data_ptr() != fused.q.data_ptr()
    for problem in (split, fused):
        parts = attention_providers.split_heads(problem.q)
        assert torch.equal(attention_providers.merge_heads(parts, problem.q.shape, problem.layout), problem.q)


def test_dense_providers_take_any_bias() -> None:
    drawn = Problem.random((1, 6, 3, 2, 8), torch.float32, CPU, "fused", 1.0)
    problem = Problem(drawn.q, drawn.k, drawn.v, drawn.g, torch.randn(6, 6), 1.0, "fused")
    exact = temporal_attention_dense_ref(problem.q, problem.k, problem.v, problem.bias[None])
    for found in attention_providers.DENSE_PROVIDERS.values():
        torch.testing.assert_close(found.prepare(problem)(), exact)


@pytest.mark.parametrize(
    ("level", "shape"),
    [(0, (2, 64, 2560, 5, 64)), (1, (2, 64, 640, 10, 64)), (3, (2, 64, 40, 20, 64)), ("init", (2, 64, 2560, 8, 64))],
)
def test_shapes_are_those_of_the_networks_levels(level: int | str, shape: tuple[int, ...]) -> None:
    assert attention_shape(FULL, FULL.size, level, 64, 2) == shape


def test_an_absent_level_is_refused() -> None:
    with pytest.raises(ValueError, match="levels 0 to 3 and init, got 4"):
        attention_shape(FULL, FULL.size, 4, 64, 2)


@pytest.mark.parametrize("spoil", ["last position", "half a percent", "shape"])
def test_a_planted_fault_is_found(spoil: str) -> None:
    problem = Problem.random((1, 8, 100, 2, 16), torch.float32, CPU, "fused", 1.0)
    answer = temporal_attention_ref(problem.q, problem.k, problem.v, problem.g)
    assert error(problem, set(), "ours", answer) < 1e-6
    if spoil == "last position":
        answer[:, :, -1] = 0.0
    elif spoil == "half a percent":
        answer *= 1.005
    else:
        answer = answer[:, :-1]
    assert error(problem, set(), "ours", answer) > ERROR_BUDGET[torch.float32]


def test_a_rehearsal_writes_a_row_a_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    monkeypatch.setitem(PROVIDERS, "planted", attention_providers.Attention(lambda problem: lambda: problem.v.clone()))
    names = [*PROVIDERS]
    assert main(["kernels", "--rehearse", "--out", str(path), "--providers", *names]) == 1
    rows = read([path])
    assert {row.case["op"] for row in rows} == set(kernels.OPS)
    table = {(row.case.get("layout"), row.provider): row for row in rows if row.case["op"] == "temporal_attention"}
    for layout in attention_providers.LAYOUTS:
        assert all(table[layout, name].status == OK for name in EAGER)
        assert table[layout, COMPILED].status == OK
        assert table[layout, XFORMERS].status == ABSENT
        assert table[layout, FLEX].status == SKIPPED
        assert table[layout, "planted"].status == WRONG
        numbers = table[layout, "ours"].numbers
        assert {"share_of_bandwidth", "share_of_matrix", "floor", "peak_bytes", "error"} <= numbers.keys()
        assert table[layout, "ours"].ceilings.keys() == {"bytes_per_second", "flops_per_second"}
    assert rows[0].command.startswith("vstar-engine bench kernels --rehearse --providers ours 'ours, g = 0'")


@pytest.mark.parametrize("layout", attention_providers.LAYOUTS)
@torch.no_grad()
def test_computed_peaks_are_the_measured_ones(layout: str, tmp_path: Path) -> None:
    path, shape = tmp_path / "rows.jsonl", (1, 16, 16, 2, 16)
    given = ["--frames", "16", "--layout", layout, "--dtype", "float32", "--batch", "1", "--device", "cpu", "--out", str(path)]
    assert main(["kernels", "--computed", "--model", "mini", "--size", "32x32", *given]) == 0
    found = {row.provider: row for row in read([path])}
    assert found.pop(XFORMERS).status == ABSENT
    assert set(found) == {name for name in EAGER if PROVIDERS[name].traced}
    for name, row in found.items():
        assert (row.suite, row.device, row.case["shape"]) == ("memory", "computed", "1x16x16x2x16")
        call = PROVIDERS[name].prepare(Problem.random(shape, torch.float32, CPU, layout, 1.0))
        call()
        assert row.numbers["peak_bytes"] == observed(call, CPU)[1]
    said = rendered("memory", [*found.values()]).splitlines()
    assert said[0].startswith("Peak MiB of `temporal_attention`, computed, not measured, batch 1, level 0")
    assert said[4] == "| frames | 16 |"
    assert "| ours | 0 |" in said
    assert rendered("kernels", [*found.values()]) == ""


def place(dtype: torch.dtype = torch.float32, level: int = 1) -> OpSite:
    return OpSite.at(MODELS["mini"], (64, 64), level, 5, 2, dtype, CPU)


def level_of(op: str) -> int:
    """The latents are there at the finest level alone."""
    return 0 if op == op_providers.UPDATE else 1


@pytest.fixture(autouse=True)
def on_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets ops that a CPU computes by their definitions be tried there."""
    monkeypatch.setattr(fp8_providers, "has_e4m3", lambda place: True)
    monkeypatch.setattr(op_providers, "on_cuda", lambda place: True)


def held_to(contest: Contest) -> dict[str, tuple[str, Tensor, float]]:
    """Returns each provider's answer and error."""
    found = {}
    for provider in contest.providers:
        answer = provider.prepare()()
        found[provider.name] = (provider.name, answer, contest.error(provider.name, answer))
    return found


@pytest.mark.parametrize("op", op_providers.OPS)
@torch.no_grad()
def test_every_way_to_compute_an_op_agrees_with_float64(op: str) -> None:
    contests = [*op_providers.contests(op, place(level=level_of(op)), level_of(op), [], "eager")]
    assert contests
    for contest in contests:
        found = held_to(contest)
        assert {OURS, op_providers.OPERATORS, COMPILED} <= found.keys()
        assert all(error <= contest.budget for *_, error in found.values()), contest.case
        assert contest.bytes is not None


@pytest.mark.parametrize("op", op_providers.OPS)
@torch.no_grad()
def test_a_fault_in_the_last_item_is_found(op: str) -> None:
    for contest in op_providers.contests(op, place(level=level_of(op)), level_of(op), [op_providers.OPERATORS], "eager"):
        (_, answer, error), *_ = held_to(contest).values()
        spoiled = answer.float()
        spoiled[-1] *= 1.05
        assert error <= contest.budget < contest.error(op_providers.OPERATORS, spoiled)
        assert contest.error(op_providers.OPERATORS, answer[:-1]) == math.inf


@pytest.mark.parametrize("op", op_providers.OPS)
@torch.no_grad()
def test_ops_of_half_precision_are_held_to_float64(op: str) -> None:
    for form in op_providers.OPS[op](place(torch.bfloat16)):
        drawn = form.draw()
        exact = form.definition(*(x.double() for x in drawn))
        assert op_providers.error_of(form, drawn)("exact", exact) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_transformer_is_held_to_float64_at_positions_from_first_to_last(dtype: torch.dtype) -> None:
    made = temporal_transformer.transformer_contest(MODELS["mini"], (64, 64), 1, 3, 2, dtype, CPU)
    answers = {provider.name: provider.prepare()() for provider in made.providers}
    assert all(made.error(name, answer) <= made.budget for name, answer in answers.items())
    spoiled = answers["ours"].clone()
    spoiled[-1, :, :, -1, -1] *= 2
    assert made.error("ours", spoiled) > made.budget
    assert made.error("ours", spoiled[:, :, :2]) == math.inf
    assert made.bytes > 2 * spoiled.nbytes


def test_the_transformers_providers_can_be_chosen() -> None:
    chosen = temporal_transformer.transformer_contest(
        MODELS["mini"], (32, 32), 0, 2, 1, torch.float32, CPU, ["clean passes", "xformers"]
    )
    assert [provider.name for provider in chosen.providers] == ["clean passes"]
    assert {"clean passes", "published passes"} <= set(kernels.known())


@torch.no_grad()
def test_the_exact_transformer_is_the_published_passes() -> None:
    module = seeded(lambda: TemporalTransformer(16, 2, 8, groups=4), CPU, torch.float64)
    attend, x = temporal_transformer.without_waste(torch.randn(5, 5)), torch.randn(2, 16, 5, 3, 4, dtype=torch.float64)
    here = torch.tensor([0, 7, 23])
    exact = temporal_transformer.exact_at(module, attend, x, here)
    torch.testing.assert_close(
        exact, temporal_transformer.by_position(temporal_transformer.transformer_by_passes(module, attend, x))[here]
    )


def test_the_decoders_norms_have_rows_of_their_own_shapes() -> None:
    shapes = {}
    for level in range(4):
        here = OpSite.at(FULL, FULL.size, level, 16, 1, torch.float32, torch.device("meta"))
        shapes[level] = next(form.draw()[0].shape for form in op_providers.norms(here) if form.name.startswith("VAE"))
    assert shapes == {0: (8, 128, 320, 512), 1: (8, 256, 160, 256), 2: (8, 512, 80, 128), 3: (8, 512, 40, 64)}
    budgets = {made.case["form"]: made.budget for made in op_providers.contests("groupnorm_silu", place(), 1, [OURS], "eager")}
    assert budgets == {"per frame": 1e-5, "whole clips": 1e-5, "VAE, per frame": op_providers.DECODER_BUDGET}


@pytest.mark.parametrize("op", ["temporal_attention", "temporal_transformer", *op_providers.OPS])
def test_every_kernel_goes_by_the_clock_of_short_calls(op: str) -> None:
    asked = ["--op", op, "--model", "mini", "--size", "32x32", "--frames", "3", "--batch", "1"]
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    for made in kernels.contests(parser.parse_args(asked), CPU):
        assert made.clock is seconds_of_short


def test_pages_are_kept_as_the_engine_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what a large answer shows is the time of mapping it."""
    kept = mock.Mock()
    monkeypatch.setattr(kernels.malloc, "keep_pages", kept)
    assert main(["kernels", "--rehearse", "--op", "geglu", "--providers", "ours"]) == 0
    kept.assert_called_once()


@torch.no_grad()
def test_what_the_engine_does_not_use_is_not_timed_as_ours() -> None:
    for contest in op_providers.contests(
        "spatial_attention", place(torch.bfloat16), 1, [OURS, op_providers.OPERATORS], "eager"
    ):
        ours, theirs = contest.providers
        with pytest.raises(NotHere, match="here the engine runs PyTorch's operators"):
            ours.prepare()
        assert contest.error(theirs.name, theirs.prepare()()) <= contest.budget


@torch.no_grad()
def test_a_sampling_step_is_ours_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    (contest,) = op_providers.contests(op_providers.UPDATE, place(level=0), 0, [OURS], "eager")
    with pytest.raises(NotHere, match="here the engine runs PyTorch's operators"):
        contest.providers[0].prepare()


def test_nothing_but_temporal_attention_is_followed_by_shapes_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """The other op was left out without a word."""
    assert main(["kernels", "--computed", "--op", "groupnorm_silu", "geglu"]) == 2
    said = capsys.readouterr()
    assert said.err == "vstar-engine: --computed follows temporal_attention alone, got --op groupnorm_silu geglu\n"
    assert not said.out


@pytest.mark.parametrize("frames", [1, 2, 7])
@torch.no_grad()
def test_three_products_are_the_convolution(frames: int) -> None:
    x = torch.randn(2, frames, 3, 8).movedim(-1, 1)
    weight, bias = torch.randn(8, 8, 3, 1, 1), torch.randn(8)
    exact = torch.nn.functional.conv2d(x, weight.flatten(3), bias, padding=(1, 0))
    torch.testing.assert_close(op_providers.by_products(x, weight, bias), exact, atol=1e-5, rtol=1e-5)


def test_a_level_that_is_not_there_is_refused_for_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--model", "mini", "--op", "geglu", "--levels", "7"]) == 2
    assert "model mini has levels 0 to 2, got 7" in capsys.readouterr().err


def test_an_unknown_provider_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--providers", "magic"]) == 2
    assert capsys.readouterr().err.startswith("vstar-engine: no provider magic; there are ours, ours, g = 0, ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_device_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--device", "cuda"]) == 6
    assert "there is no device cuda: PyTorch" in capsys.readouterr().err


def test_the_reference_is_never_timed_as_ours(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with mock.patch.object(attention_providers.library, "status", return_value=(False, "no compiler")):
        assert main(["kernels", "--rehearse", "--out", str(path), "--providers", "ours"]) == 0
    rows = [row for row in read([path]) if row.provider == "ours"]
    assert {(row.status, row.note) for row in rows} == {(ABSENT, "the CPU kernel is not built: no compiler")}
