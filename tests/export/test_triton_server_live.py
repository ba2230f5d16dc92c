"""A model repository in a running Triton Inference Server: every model loads, and a video is streamed."""

import json
import os
import shutil
import socket
import subprocess
import time

import support.onnx_packages  # noqa: F401 - skips this module where the packages are missing

# isort: split
import httpx
import numpy as np
import pytest
import torch

from vstar_engine import Sampling
from vstar_engine.commands.main import main

SERVER = "tritonserver"
START_SECONDS = 120


@pytest.fixture(params=["onnxruntime", "tensorrt"])
def engine(request, tmp_path):
    if shutil.which(SERVER) is None:
        pytest.skip(f"needs {SERVER} in the path, with its python and {request.param} back ends")
    if request.param == "onnxruntime":
        return request.getfixturevalue("onnx_engine").folder
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, PyTorch finds none here")
    pytest.importorskip("tensorrt", reason="needs TensorRT of the server's version")
    words = ["build", "--model", "mini", "--backend", "tensorrt", "--device", "cuda", "--frames", "16,32", "--size", "32x64"]
    assert main([*words, "--out", str(tmp_path / "e")]) == 0
    return tmp_path / "e"


@pytest.fixture
def address(engine, tmp_path):
    """The address of a server that has loaded the engine's repository and no other library of ours."""
    repository = tmp_path / "models"
    assert main(["export", "triton-server", str(engine), "--out", str(repository)]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model-repository", str(repository), "--http-port", str(port), "--allow-grpc=false", "--allow-metrics=false"]
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen([SERVER, *words], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "2"})
    try:
        begun = time.monotonic()
        while server.poll() is None and time.monotonic() - begun < START_SECONDS:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/v2/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        else:
            raise AssertionError((tmp_path / "log").read_text()[-4000:])
        yield f"http://127.0.0.1:{port}/v2/models"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.parametrize("frames", [5, 17], ids=["first profile", "second profile"])
def test_a_video_is_streamed(address, mini, frames):
    for name in ("vstar", "vstar_unet", "vstar_decoder", "vstar_text"):
        assert httpx.get(f"{address}/{name}/ready").status_code == 200
    settings = {"frames": frames, "seed": 4, "sampling": {"steps": 3}}
    request = {"STATES": ["snow", "flowers"], "SETTINGS": json.dumps(settings)}
    with httpx.stream("POST", f"{address}/vstar/generate_stream", json=request, timeout=120) as response:
        assert response.status_code == 200
        events = [json.loads(line.removeprefix("data:")) for line in response.iter_lines() if line.startswith("data:")]
    assert [event["STEP"] for event in events] == [[1, 3], [2, 3], [3, 3], [3, 3]]
    video = np.array(events[-1]["VIDEO"], dtype=int)
    eager = mini.generate(["snow", "flowers"], frames=frames, seed=4, size=(32, 64), sampling=Sampling(steps=3)).frames
    # ONNX Runtime's bytes are at most 1 off; TensorRT may multiply in TF32
    assert abs(video.reshape(eager.shape) - eager).mean() < 0.5
