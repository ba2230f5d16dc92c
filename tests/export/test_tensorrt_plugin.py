"""The quickly deployable plugin's life cycle by TensorRT's own Python code: types, shapes, tactics, launches, PTX."""

from itertools import product

import pytest

from support import tensorrt_wheels

pytest.importorskip("triton", reason="needs Triton")

from vstar_engine.kernels.tensorrt.aot_plugin import TYPES, kernels
from vstar_engine.kernels.tensorrt.tactics import INTEGERS, POINTERS, SHARED_WITHOUT_ASKING, strip_hidden, tactics

VERSIONS = [
    pytest.param("10.13"),
    pytest.param("11.4"),
    pytest.param("10.16", marks=pytest.mark.slow),
    pytest.param("11.0", marks=pytest.mark.slow),
]
# (batch, frames, positions)
SHAPES = [(1, 1, 1), (2, 7, 9), (2, 16, 40), (1, 17, 160), (2, 64, 33), (3, 128, 5), (2, 200, 12), (1, 512, 2)]


def walked(version, type, arch, heads=2, head_dim=16, g_rows=-1, **more):
    environment = tensorrt_wheels.bindings(version)
    request = {"type": type, "arch": arch, "heads": heads, "head_dim": head_dim, "g_rows": g_rows, "assembled_for": [arch]}
    return tensorrt_wheels.child(
        "tensorrt_lifecycle.py", environment, largest=(3, 512, 160), shapes=SHAPES, **{**request, **more}
    )


def check(result, type, arch, heads, head_dim, g_rows):
    assert result["output"] == [type, [[b, t, p, heads, head_dim] for b, t, p in SHAPES]]
    # of a strongly typed network only the combination of its own types, linear, is offered
    assert result["formats"] == [[type, "LINEAR"]] * 3 + [["FLOAT", "LINEAR"], [type, "LINEAR"]]
    table = tactics(head_dim, TYPES[type], arch)
    assert {found["tactic"] for found in result["tactics"]} <= set(range(1, len(table) + 1))
    assert any(found["tactic"] == len(table) for found in result["tactics"]), "the sweep serves every length well"
    for found in result["tactics"]:
        tactic = table[found["tactic"] - 1]
        assert not any(found["ptxas"]), found["ptxas"]
        assert found["parameters"] == len(POINTERS) + len(INTEGERS)
        for (b, t, p), launch, arguments in zip(SHAPES, found["launches"], found["arguments"], strict=True):
            tiled = t <= tactic.frames
            programs = b * heads * (-(-p // tactic.run) if tiled else p * -(-t // tactic.sweep.rows))
            assert launch["grid_x"] == programs
            assert launch["block_x"] == int(found["reqntid"])
            assert [launch[size] for size in ("grid_y", "grid_z", "block_y", "block_z")] == [1] * 4
            assert 0 < launch["shared_mem"] <= SHARED_WITHOUT_ASKING
            assert arguments == [t, p, heads, tactic.run, t if g_rows == -1 and b > 1 else 0]


@pytest.mark.parametrize("version", VERSIONS)
def test_life_cycle(version):
    # hardware-compatible engines carry sm_80's PTX
    result = walked(version, "HALF", 80, assembled_for=[80, 89, 120])
    assert result["version"].startswith(version)
    check(result, "HALF", 80, 2, 16, -1)


def test_one_g_for_every_row():
    check(walked("11.4", "FLOAT", 90, g_rows=1), "FLOAT", 90, 2, 16, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("type", "arch"), list(product(TYPES, (80, 86, 89, 90, 100, 120))))
def test_every_architecture_and_type(type, arch):
    check(walked("11.4", type, arch, heads=5, head_dim=64), type, arch, 5, 64, -1)


def test_what_wants_more_shared_memory_is_not_offered():
    offered = kernels(64, "fp16", 80)
    assert set(offered) < set(range(1, len(tactics(64, "fp16", 80)) + 1))
    assert all(kernel.shared <= SHARED_WITHOUT_ASKING for _, kernel in offered.values())


ENTRY = ".visible .entry kernel(\n\t.param .u64 kernel_param_0,\n\t.param .u64 kernel_param_1\n)\n.reqntid 32\n{\n%s\n}\n"


def test_hidden_parameters_are_removed():
    assert strip_hidden(ENTRY % "ld.param.u64 %rd1, [kernel_param_0];", 1).count(".param .") == 1


def test_a_hidden_parameter_in_use_is_refused():
    with pytest.raises(ValueError, match=r"use no other, got 2 and \['kernel_param_1'\] in use"):
        strip_hidden(ENTRY % "ld.param.u64 %rd1, [kernel_param_1];", 1)
