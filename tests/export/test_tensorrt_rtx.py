"""NVIDIA's own parser and builder (TensorRT for RTX) on the project's files, without a GPU; opt in with VSTAR_RTX=1.

Everything of NVIDIA's runs in child processes. This shows what is parsed, mapped to plugins and built, and no value: nothing
executes without a GPU.
"""

import os
import re
import subprocess
import sys

import support.onnx_packages  # noqa: F401 - skips this module where the packages are missing

# isort: split
import pytest
import torch

from support import tensorrt_wheels
from support.tensorrt_plans import FOUR, built, check_unet, job

pytest.importorskip("triton", reason="needs Triton")

from support.onnx_blocks import block
from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.config.models import MODELS
from vstar_engine.export import to_onnx
from vstar_engine.export.traced_networks import unet
from vstar_engine.weights.checkpoint import Weights


def test_every_node_becomes_a_plugin_for_four_architectures(tmp_path):
    kinds = {"float32": "FLOAT", "float16": "HALF"}
    files = [block(tmp_path / f"{dtype}.onnx", dtype) for dtype in kinds]
    for path, kind, result in zip(
        files, kinds.values(), built(*(job(f, 2, frames=(16, 64), targets=FOUR) for f in files)), strict=True
    ):
        assert result["plugin_layers"] == 2, result
        assert path.with_suffix(".plan").stat().st_size == result["bytes"] > 0
        assert any("%" in line for line in result["said"]), "progress was reported"
        seen = {(tuple(q[1]), tuple(q[2]), tuple(g[1]), tuple(g[2])) for q, _, _, g, _ in result["configured"]}
        assert all([x[0] for x in tensors] == [kind, kind, kind, "FLOAT", kind] for tensors in result["configured"])
        # the profile of up to 16 frames, and the one that goes on from there
        assert seen == {
            ((1, 1, 1, 2, 16), (4, 16, 160, 2, 16), (1, 1), (4, 16)),
            ((1, 17, 1, 2, 16), (4, 64, 160, 2, 16), (1, 17), (4, 64)),
        }


DECOMPOSED = {"no namespace": 0, "version": 0, "nested": 1}


def test_what_would_run_otherwise_than_asked_is_refused(tmp_path):
    good = block(tmp_path / "good.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(good.read_bytes()[:500])
    wrong = [job(block(tmp_path / f"{fault.replace(' ', '_')}.onnx", fault=fault), 2) for fault in DECOMPOSED]
    few = job(good, 2, ranges={"batch": [1, 2, 4]})
    *decomposed, unparsed, unknown, unnamed = built(*wrong, job(damaged, 2), job(good, 2, targets=["SM90"]), few)
    for result, left in zip(decomposed, DECOMPOSED.values(), strict=True):
        assert f"the parsed network holds {left} plugin layers where the file has 2" in result["error"]
    assert "cannot parse damaged.onnx" in unparsed["error"]
    assert "unknown targets SM90; TensorRT for RTX 1.7.1.116 knows SM75" in unknown["error"]
    assert "input hidden has free axes 'positions'" in unnamed["error"]
    assert not list(tmp_path.glob("*.plan"))


def test_without_a_plugin_the_body_is_built(tmp_path):
    (result,) = built(job(block(tmp_path / "block.onnx"), 0, plugin="none"))
    assert result["plugin_layers"] == 0
    assert result["layers"] > 40
    assert result["configured"] == []


PLANTED = {"namespace": "holds 0 plugin layers", "version": "did not take the python plugin"}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_wrong_plugin_is_found(fault, tmp_path):
    (result,) = built(job(block(tmp_path / "block.onnx"), 2), fault=fault)
    assert PLANTED[fault] in result["error"]


def test_a_plugin_of_the_wrong_output_type_does_not_build(tmp_path):
    path = block(tmp_path / "block.onnx")
    right = job(path, 2, out=tmp_path / "right.plan")
    (result,) = built(right)
    assert result["plugin_layers"] == 2
    # TensorRT for RTX refuses the graph, or does not outlive it (1.7.1: its heap is damaged, SIGABRT)
    try:
        (result,) = built({**right, "out": str(tmp_path / "wrong.plan")}, fault="output type")
    except tensorrt_wheels.ChildDied as death:
        result = {"kind": str(death)}
    assert re.match("ExportError|exit status -(6|11)", result["kind"])
    assert not (tmp_path / "wrong.plan").exists()


@pytest.mark.parametrize("frames", [(16,), pytest.param((7, 16), marks=pytest.mark.slow)], ids=str)
def test_the_file_that_onnx_runtime_runs_becomes_a_plan(onnx_engine, tmp_path, frames):
    nodes = onnx_engine.manifest["facts"]["unet"]["temporal_attentions"]
    check_unet(onnx_engine.file("unet.onnx"), nodes, "FLOAT", tmp_path / "unet.plan", frames)


@pytest.mark.slow
def test_the_mini_unet_in_float16_becomes_a_plan(mini_weights, tmp_path):
    path = tmp_path / "unet.onnx"
    facts = to_onnx.write(unet(MODELS["mini"].unet, torch.float16, (4, 8)), Weights(mini_weights), path)
    check_unet(path, facts["temporal_attentions"], "HALF", tmp_path / "unet.plan")


@pytest.mark.slow
def test_a_mini_engine_is_built_by_the_command_line(tmp_path):
    out = tmp_path / "engine"
    words = ["build", "--backend", "tensorrt-rtx", "--model", "mini", "--dtype", "float16", "--frames", "16", "--level", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "vstar_engine", *words, "--targets", "SM89", "--out", str(out)],
        env={**os.environ, **tensorrt_wheels.rtx()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    artifact = BuiltEngine.open(out)
    facts = artifact.manifest["facts"]
    assert facts["plan"]["plugin_layers"] == facts["unet"]["temporal_attentions"] > 0
    assert artifact.file("unet.plan").stat().st_size > 1e6
    assert [path.name for path in sorted(out.iterdir())] == ["manifest.json", "unet.plan"]
    assert artifact.identity["options"] == {
        "plugin": "python",
        "opset": 21,
        "workspace": 8192,
        "level": 0,
        "targets": ["SM89"],
    }
    assert artifact.identity["versions"] == {"tensorrt-rtx": tensorrt_wheels.RTX}
    assert artifact.identity["device"] == "cuda"
