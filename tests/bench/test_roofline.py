"""The map of a forward: FLOPs that agree with the architecture's, bytes of known ops, floors that add up, and times."""

import re
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise

import pytest
import torch

from vstar_engine.bench.__main__ import main
from vstar_engine.bench.commands import roofline
from vstar_engine.bench.commands.report import rendered
from vstar_engine.bench.harness.contest import Pace
from vstar_engine.bench.harness.rows import OK, WRONG, ResultFile, read
from vstar_engine.bench.roofline import floors, fused_costs
from vstar_engine.bench.roofline.op_costs import KEYS, Machine, Op, ops_of
from vstar_engine.bench.step.workload import TINY, Workload
from vstar_engine.config.models import model_named
from vstar_engine.kernels.cpu import library

# TFLOP of one branch at 320x512, and shares at 64 frames, counted by hand from the architecture
PUBLISHED = {16: 12.58, 64: 50.54}
SHARES = {
    "spatial convolution": 0.331,
    "temporal convolution": 0.133,
    "spatial feed-forward": 0.122,
    "temporal feed-forward": 0.142,
}
MACHINE = Machine(flops=100.0, bandwidth=10.0)


@pytest.fixture(scope="module")
def full():
    spec = model_named("videocrafter2")
    return ops_of(spec, 64, spec.size, torch.float16, batch=1)


@pytest.fixture(scope="module")
def small():
    return ops_of(model_named("mini"), 16, (96, 128), torch.float32)


def test_flops_are_the_architectures(full):
    assert sum(op.flops for op in full) / 1e12 == pytest.approx(PUBLISHED[64], rel=1e-3)


def test_shares_by_kind_are_the_architectures(full):
    whole = sum(op.flops for op in full)
    for kind, share in SHARES.items():
        assert sum(op.flops for op in full if op.kind == kind) / whole == pytest.approx(share, abs=1e-3)


def test_the_regularised_attention_is_one_op_a_layer_that_moves_four_tensors(full):
    found = [op for op in full if op.kind == "temporal attention"]
    assert len(found) == 34
    level0 = next(op for op in found if op.module.startswith("input_blocks.1."))
    assert level0.bytes == pytest.approx(4 * 64 * 40 * 64 * 320 * 2, rel=1e-3)


def test_every_product_of_a_small_model_has_a_kind_of_the_map(small):
    kinds = {op.kind for op in small if op.flops}
    products = {f"{where} {what}" for where in ("spatial", "temporal") for what in ("attention", "feed-forward", "projections")}
    assert kinds == products | {"spatial convolution", "temporal convolution", "embeddings"}


def test_a_second_branch_repeats_what_hears_a_text(small):
    alone = ops_of(model_named("mini"), 16, (96, 128), torch.float32, batch=1)
    first = (
        "input_blocks.0",
        "init_attn",
        "input_blocks.1.0",
        "input_blocks.1.1.proj_in",
        "input_blocks.1.1.transformer_blocks.0.attn1",
    )

    def flops(ops, before):
        return sum(op.flops for op in ops if op.module.startswith(first) == before)

    assert flops(small, True) == flops(alone, True) > 0
    assert flops(small, False) == pytest.approx(2 * flops(alone, False), rel=1e-3)


def test_a_floor_is_the_longer_of_arithmetic_and_traffic():
    assert Op("", "mm", 1000, 50).floor(MACHINE) == 10.0
    assert Op("", "mm", 100, 50).floor(MACHINE) == 5.0


def test_the_table_adds_up_and_names_the_limit():
    ops = [Op("a.ff", "mm", 1000, 50), Op("b", "silu", 0, 30), Op("c", "native_group_norm", 0, 20)]
    lines = roofline.table(ops, MACHINE, lambda op: op.name)
    assert [(line[0], line[7], line[8]) for line in lines] == [
        ("mm", "66.7%", "arithmetic"),
        ("silu", "20.0%", "memory"),
        ("native_group_norm", "13.3%", "memory"),
    ]
    text = roofline.report(ops, MACHINE, "op", steps=25)
    assert "15000.0 ms op by op; 10000.0 ms" in text
    assert "25 steps: 375.00, 250.00 and 250.00 s" in text


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """What the command prints of the tiny model, and its rows."""
    path = tmp_path_factory.mktemp("computed") / "rows.jsonl"
    with redirect_stdout(StringIO()) as printed:
        assert main(["roofline", "--model", "tiny", "--frames", "2", "--by", "block", "--out", str(path)]) == 0
    return printed.getvalue(), read([path])


def test_the_command_prints_a_map(computed):
    printed, _ = computed
    assert "tiny, 2 frames of 32x32, batch 2, float16" in printed
    assert "output_blocks.0" in printed


def test_a_map_is_by_kind_block_or_op(small):
    for by, name in {"kind": "temporal attention", "block": "output_blocks.0", "op": "groupnorm_silu"}.items():
        assert f"\n| {name} | " in roofline.report(small, MACHINE, by, 25)


def test_the_map_of_a_cpu_holds_its_fused_ops(small):
    """In float32 the ops are a CPU's: projections with bias, residual or gate in one, spatial attention by our kernel."""
    if not library.status()[0]:
        pytest.skip(f"needs the CPU kernel: {library.status()[1]}")
    half = ops_of(model_named("mini"), 16, (96, 128), torch.float16)
    assert not [op for op in small if op.name in ("gelu", "native_group_norm", "geglu")]
    assert not [op for op in half if op.name in ("gelu", "native_group_norm")]
    assert {op.name for op in small if op.kind == "spatial attention"} == {"temporal_attention"}
    assert {op.name for op in small if op.kind == "temporal feed-forward"} == {"linear"}
    assert len(small) < len(half)


def count(ops, name):
    return len([op for op in ops if op.name == name])


def test_fusing_takes_operators_and_bytes_away_and_sharing_arithmetic_too():
    stages = {
        stage: fused_costs.ops_at(model_named("mini"), stage, 16, (96, 128), torch.float16) for stage in fused_costs.STAGES
    }
    found = [fused_costs.totals(ops, MACHINE) for ops in stages.values()]
    operators, attention, fused, stem, whole, products, apart, linear, convolved, small = found
    for before, after in pairwise(found[:-4]):
        assert after["bytes"] < before["bytes"]
    for before, after in ((operators, attention), (attention, fused), (whole, products)):
        assert after["ops"] < before["ops"]
        assert after["flops"] == pytest.approx(before["flops"], rel=1e-6)
    assert whole["flops"] < stem["flops"] < fused["flops"]
    assert whole["ops"] < stem["ops"]
    # what is left of embeddings, texts and the sampler is one operator
    assert [op.name for op in stages[fused_costs.ENGINE] if op.kind == "embeddings" or "to_kv" in op.module] == []
    assert [op.name for op in stages[fused_costs.ENGINE]].count("guided_step") == 1
    left = {op.name.removeprefix("native_") for op in stages[fused_costs.PRODUCTS]}
    assert not left & {"layer_norm", "geglu"}
    assert len([op for op in stages[fused_costs.PRODUCTS] if op.name == "var_mean"]) == len(
        [op for op in stages[fused_costs.ENGINE] if op.name.endswith("layer_norm")]
    )
    assert {"group_norm", "gelu"} & {op.name.removeprefix("native_") for op in stages[fused_costs.ATTENTION]} == {
        "group_norm",
        "gelu",
    }
    assert "bmm" not in {op.name for op in stages[fused_costs.ATTENTION] if op.kind == "temporal attention"}
    # the same arithmetic is done sooner
    speedy = {fused_costs.SMALL_LINEAR: {"linear_e4m3"}, fused_costs.SMALL_CONVOLUTIONS: {"conv_e4m3"}}
    speedy |= {fused_costs.SMALL: {"linear_e4m3", "conv_e4m3"}, fused_costs.SMALL_OPERATORS: {"scaled_mm", "conv_e4m3"}}
    for stage, names in speedy.items():
        assert {op.name for op in stages[stage] if op.speed == 2} == names
        assert fused_costs.totals(stages[stage], MACHINE)["flops"] == whole["flops"]
    # as operators every layer's rounding is one and bytes more; in one go linear layers take as many as exact ones, and less
    assert count(stages[fused_costs.SMALL_OPERATORS], "to_e4m3") == apart["ops"] - whole["ops"] > 0
    assert apart["bytes"] > whole["bytes"]
    assert linear["ops"] == products["ops"]
    assert linear["bytes"] < products["bytes"]
    assert (
        count(stages[fused_costs.SMALL], "to_e4m3")
        == count(stages[fused_costs.SMALL], "conv_e4m3")
        == small["ops"] - linear["ops"]
    )
    assert convolved["ops"] == small["ops"]
    assert max(small["floor"], linear["floor"], convolved["floor"]) < products["floor"]
    assert small["floor"] < min(linear["floor"], convolved["floor"])
    assert len([op for op in stages[fused_costs.SMALL] if op.name == "convolution"]) == 2


def test_no_layer_takes_longer_in_fp8():
    """At an H200's rates: what is converted pays, layer by layer."""
    spec, machine, floors = model_named("videocrafter2"), Machine(790e12, 4.8e12), {}
    for stage in (fused_costs.PRODUCTS, fused_costs.SMALL):
        here = floors.setdefault(stage, Counter())
        for op in fused_costs.ops_at(spec, stage, 16, spec.size, torch.float16):
            here[op.module] += op.floor(machine)
    exact, small = floors.values()
    assert [name for name in small if small[name] > exact[name] * (1 + 1e-9)] == []
    assert small.total() < 0.7 * exact.total()


def test_products_in_fp8_take_half_the_time():
    assert Op("", "conv_e4m3", 1000, 50, 2).floor(MACHINE) == 5.0
    assert Op("", "conv_e4m3", 1000, 80, 2).floor(MACHINE) == 8.0


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Rows of a measurement on this machine."""
    path = tmp_path_factory.mktemp("roofline") / "rows.jsonl"
    assert main(["roofline", "--measure", "--rehearse", "--out", str(path)]) == 0
    return read([path])


def test_every_op_is_timed_beside_its_floor(measured):
    """Each op once by kind and once by block, its floor at the rates of the same run."""
    parts = {part: [row for row in measured if row.case["part"] == part] for part in ("kind", "block", "whole")}
    (whole,) = parts["whole"]
    assert {row.status for row in measured} == {OK}
    for part in floors.PARTS:
        for name in ("ops", "flops", "bytes", "floor"):
            assert sum(row.numbers[name] for row in parts[part]) == pytest.approx(whole.numbers[name])
        assert sum(row.numbers["share"] for row in parts[part]) == pytest.approx(1)
    first = parts["kind"][0]
    machine = Machine(first.ceilings["flops_per_second"], first.ceilings["bytes_per_second"])
    ops = ops_of(TINY, 3, TINY.size, torch.float32)
    assert whole.numbers["floor"] == pytest.approx(sum(op.floor(machine) for op in ops), rel=1e-3)
    assert {row.provider for row in parts["block"]} == {KEYS["block"](op) for op in ops}


def test_a_slow_op_is_found_where_it_stands(monkeypatch):
    """By a clock that ticks a microsecond a look and twenty milliseconds in one op of the last block."""
    workload = Workload("tiny", 3, TINY.size, torch.float32, torch.device("cpu"))
    last = workload.unet(torch.float32, "channels_last").out[2]
    convolve, now = last._conv_forward, [0.0]

    def mark():
        now[0] += 1e-6
        return now[0]

    def late(x):
        now[0] += 0.02
        return x.clone()

    library = torch.library.Library("test_roofline", "DEF")
    library.define("late(Tensor x) -> Tensor")
    library.impl("late", late, "CPU")
    monkeypatch.setattr(last, "_conv_forward", lambda *given: torch.ops.test_roofline.late(convolve(*given)))
    monkeypatch.setattr(floors, "mark", mark)
    with ResultFile(None, "test") as rows:
        found = floors.measure(workload, rows, Pace(rounds=3, warmup=1))
    blocks = {row.provider: row.numbers["median"] for row in found if row.case["part"] == "block"}
    assert blocks.pop("out") == pytest.approx(0.02, rel=0.01)
    assert max(blocks.values()) < 1e-3


def test_the_budget_is_the_runs(monkeypatch):
    """Not each length's: the second has what the first left."""
    deadlines = []
    monkeypatch.setattr(floors, "measure", lambda scene, rows, pace: deadlines.append(pace.deadline) or [])
    assert main(["roofline", "--measure", "--model", "tiny", "--frames", "3", "5", "--device", "cpu", "--budget", "9"]) == 0
    assert len(deadlines) == 2
    assert len(set(deadlines)) == 1


def test_a_wrong_network_is_not_timed(monkeypatch, tmp_path):
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(floors, "relative_error", lambda got, wanted: 0.5)
    assert main(["roofline", "--measure", "--rehearse", "--out", str(path)]) == 1
    assert {(row.provider, row.status) for row in read([path])} == {(floors.FORWARD, WRONG), (floors.BY_OPS, WRONG)}


def test_the_tables_rank_by_time_and_end_with_the_whole(measured):
    said = rendered("roofline", measured)
    kinds = said.partition("by block")[0].splitlines()
    assert "One guided step of 3 frames by kind, `tiny` at 32x32" in kinds[0]
    assert kinds[4] == "| kind | ops | work | floor | time (of the ops' time) | floor / time |"
    shares = [float(share) for line in kinds for share in re.findall(r"\((\d+\.\d)%\)", line)]
    assert shares == sorted(shares, reverse=True)
    assert sum(line.startswith("| whole forward") for line in said.splitlines()) == 2


def test_computed_counts_are_rows_of_a_table(computed):
    _, rows = computed
    assert {row.device for row in rows} == {"computed"}
    said = rendered("fusion", rows).splitlines()
    assert said[0].startswith(
        "One guided step, computed, not measured, `tiny` at 32x32, float16; floors at 790 TFLOP/s, 4.8 TB/s"
    )
    assert [line.split("|")[1].strip() for line in said[6:]] == [f"2 frames, {stage}" for stage in fused_costs.STAGES]
    assert rendered("roofline", rows) == ""


def test_one_branch_is_not_measured(capsys):
    assert main(["roofline", "--measure", "--batch", "1"]) == 2
    assert "--measure runs both guidance branches, got --batch 1; leave it out" in capsys.readouterr().err


def test_a_size_the_model_cannot_take_is_refused(capsys):
    assert main(["roofline", "--model", "mini", "--size", "100x100"]) == 2
    assert "multiples of 32" in capsys.readouterr().err
