"""Every call of TensorRT in the code that builds, runs and refits, against the bindings of several versions."""

import pytest

from support import tensorrt_wheels

pytest.importorskip("triton", reason="needs Triton")

VERSIONS = [
    pytest.param("10.13"),
    pytest.param("11.4"),
    pytest.param("10.16", marks=pytest.mark.slow),
    pytest.param("11.0", marks=pytest.mark.slow),
]


def calls(version, folder, **request):
    # the plugin's kernel runs in Triton's interpreter
    environment = {**tensorrt_wheels.bindings(version), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return tensorrt_wheels.child("tensorrt_calls.py", environment, folder=str(folder), **request)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_bindings_take_every_call(version, tmp_path):
    found = calls(version, tmp_path)
    assert found["version"].startswith(version)
    assert found["unresolved"] == []
    assert found["unexecuted"] == [], "\n".join(found["unexecuted"])
    assert found["built"] == [4, 4, 4]
    assert (tmp_path / "timings").read_bytes() == b"timings"
    assert found["ran"] == [[2, 4, 2, 8, 8], [2, 4, 4, 8, 8], [2, 4, 2, 8, 8]]
    refused = f"TensorRT {found['version']} cannot load DIR: it gives no reason; rebuild it: build"
    assert found["opened"] == ["ICudaEngine", "ICudaEngine", refused]
    assert found["refitted"] == len(b"refitted")
    assert found["enqueued"] < 1e-5


PLANTED = {
    "removed flag": "FP16",
    "removed attribute": "IBuilderConfig has no int8_calibrator",
    "registry": "IPluginRegistry has no plugin_creator_list",
    "arity": "IBuilderConfig.set_flag in TensorRT 11.4.0.106 takes no such call",
    "keyword": "IExecutionContext.execute_async_v3 in TensorRT 11.4.0.106 takes no such call",
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_call_that_the_bindings_refuse_is_found(fault, tmp_path):
    assert PLANTED[fault] in calls("11.4", tmp_path, fault=fault)["refused"]


def test_what_11_removed_was_there_in_10_13(tmp_path):
    assert calls("10.13", tmp_path, fault="removed flag")["refused"] == ""
