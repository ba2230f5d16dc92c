"""NVIDIA's own parser and builder (TensorRT for RTX) on the project's files, without a GPU; opt in with VSTAR_RTX=1.

Everything of NVIDIA's runs in child processes. This shows what is parsed, mapped to plugins and built, and no value: nothing
executes without a GPU.
"""

import json

import pytest
import tensorrt_wheels

onnx = pytest.importorskip("onnx", reason="needs the onnx package")
pytest.importorskip("triton", reason="needs Triton")

from onnx_blocks import block

FOUR = ["SM80", "SM86", "SM89", "SM120"]
RANGES = {"batch": [1, 2, 4], "positions": [1, 48, 160]}


def built(onnx_file, nodes, plugin="python", frames=(16,), ranges=RANGES, **more):
    environment = tensorrt_wheels.rtx()
    out = onnx_file.with_suffix(".plan")
    request = {"onnx": str(onnx_file), "out": str(out), "nodes": nodes, "plugin": plugin, "frames": frames, "ranges": ranges}
    return tensorrt_wheels.child("tensorrt_rtx_build.py", environment, **request, **more), out


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_node_becomes_a_plugin_for_four_architectures(dtype, tmp_path):
    result, out = built(block(tmp_path / "block.onnx", dtype), 2, frames=(16, 64), targets=FOUR)
    assert result["plugin_layers"] == 2, result
    assert out.stat().st_size == result["bytes"] > 0
    kind = {"float32": "FLOAT", "float16": "HALF"}[dtype]
    low, high = [1, 1, 1, 2, 16], [4, 64, 160, 2, 16]
    tensors = [kind, low, high]
    # configured with types and shapes that span a profile, for both nodes
    assert len(result["configured"]) >= 2
    for inputs in result["configured"]:
        assert [tensor[0] for tensor in inputs] == [kind, kind, kind, "FLOAT", kind]
        assert inputs[3][1][1] in (1, 17)
        assert inputs[0][1] in (low, [1, 17, 1, 2, 16])
        assert inputs[0][2] in (tensors[2], [4, 16, 160, 2, 16])
    assert any("%" in line for line in result["said"]), "progress was reported"


def test_without_a_plugin_the_body_is_built(tmp_path):
    result, _ = built(block(tmp_path / "block.onnx"), 0, plugin="none")
    assert result["plugin_layers"] == 0
    assert result["layers"] > 40


FAULTS = {
    "no namespace": ("the parsed network holds 0 plugin layers where the file has 2", {}),
    "version": ("the parsed network holds 0 plugin layers where the file has 2", {}),
    "nested": ("the parsed network holds 1 plugin layers where the file has 2", {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_node_that_would_be_decomposed_is_refused(fault, tmp_path):
    result, out = built(block(tmp_path / "block.onnx", fault=fault), 2)
    assert result["kind"] == "ExportError"
    assert FAULTS[fault][0] in result["error"]
    assert not out.exists()


PLANTED = {
    "namespace": "holds 0 plugin layers",
    "version": "did not take the python plugin",
    "output type": "cannot",
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_wrong_plugin_is_found(fault, tmp_path):
    result, out = built(block(tmp_path / "block.onnx"), 2, fault=fault)
    assert PLANTED[fault] in result.get("error", json.dumps(result))
    assert not out.exists()


def test_a_file_that_is_damaged_is_refused_with_the_parsers_words(tmp_path):
    path = tmp_path / "block.onnx"
    path.write_bytes(block(path).read_bytes()[:500])
    result, _ = built(path, 2)
    assert "cannot parse block.onnx" in result["error"]


def test_what_tensorrt_for_rtx_lacks_is_refused(tmp_path):
    path = block(tmp_path / "block.onnx")
    assert "unknown targets SM90; TensorRT for RTX 1.7.1.116 knows SM75" in built(path, 2, targets=["SM90"])[0]["error"]
    assert "free axes 'positions'" in built(path, 2, ranges={"batch": [1, 2, 4]})[0]["error"]
