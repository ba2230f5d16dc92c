"""The map of a forward: FLOPs that agree with the published architecture's, bytes of known ops, floors that add up."""

import pytest
import torch

from vstar_engine.bench import roofline
from vstar_engine.bench.__main__ import main
from vstar_engine.bench.roofline import Machine, Op
from vstar_engine.config import model_named

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
    return roofline.ops_of(spec, 64, spec.size, torch.float16, batch=1)


@pytest.fixture(scope="module")
def small():
    return roofline.ops_of(model_named("mini"), 16, (96, 128), torch.float32)


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
    alone = roofline.ops_of(model_named("mini"), 16, (96, 128), torch.float32, batch=1)
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


@pytest.mark.parametrize("by", ["kind", "block", "op"])
def test_the_command_prints_a_map(by, capsys):
    assert main(["roofline", "--model", "mini", "--frames", "2", "--by", by]) == 0
    printed = capsys.readouterr().out
    assert "mini, 2 frames of 96x128, batch 2, float16" in printed
    assert {"kind": "temporal attention", "block": "output_blocks.0", "op": "groupnorm_silu"}[by] in printed


def test_a_size_the_model_cannot_take_is_refused(capsys):
    assert main(["roofline", "--model", "mini", "--size", "100x100"]) == 2
    assert "multiples of 32" in capsys.readouterr().err
