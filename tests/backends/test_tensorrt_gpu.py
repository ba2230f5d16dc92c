"""TensorRT's engines on a GPU: built, inspected, run against eager, refitted. Each in processes of its own, for one plugin."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from vstar_engine.artifacts.built_engine import BuiltEngine

ROOT = Path(__file__).parents[2]
SIZE = "32x64"
MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
ROUTES = [("tensorrt", "aot"), ("tensorrt", "python"), ("tensorrt", "cpp"), ("tensorrt-rtx", "python"), ("tensorrt-rtx", "cpp")]
pytestmark = pytest.mark.gpu


def need(backend, plugin="aot"):
    """Skips, naming what is missing."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"needs {package}: make test")
    if not any(importable(module) for module in MODULES[backend]):
        pytest.skip(f"needs {MODULES[backend][0]}, NVIDIA's proprietary package for backend {backend}")
    if plugin == "cpp" and not os.environ.get("VSTAR_TENSORRT_PLUGIN"):
        pytest.skip("needs VSTAR_TENSORRT_PLUGIN to name the plugin built from csrc/tensorrt with -DHEAD_DIMS=16")


def importable(module):
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


def command(*words, code=0):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def build(folder, backend, *more):
    words = ["build", "--model", "mini", "--backend", backend, "--dtype", "float16", "--device", "cuda", "--size", SIZE]
    command("-m", "vstar_engine", *words, "--frames", "16,32", *more, "--out", folder)
    return BuiltEngine.open(folder)


def check_run(folder, weights=None):
    """Holds an engine to eager at lengths of both profiles, as it is enqueued, captured and replayed."""
    found = json.loads(command("tests/support/engine_parity.py", folder, *([weights] if weights else [])).splitlines()[-1])
    assert [row["frames"] for row in found["rows"]] == [1, 3, 16, 17, 32, 3]
    for row in found["rows"]:
        # enqueued, captured, replayed
        assert all(error <= row["bar"] for error in row["errors"]), row
        assert row["same"], "the graph gives what the plain call gave"


@pytest.fixture(scope="module", params=ROUTES, ids="-".join)
def engine(request, tmp_path_factory):
    backend, plugin = request.param
    need(backend, plugin)
    major, minor = torch.cuda.get_device_capability()
    targets = ["--targets", f"SM{major}{minor}"] if backend == "tensorrt-rtx" else []
    return build(tmp_path_factory.mktemp(backend) / "e", backend, "--plugin", plugin, *targets)


def test_every_attention_is_a_plugin(engine):
    facts = engine.manifest["facts"]
    assert facts["plan"]["plugin_layers"] == facts["unet"]["temporal_attentions"] > 0
    assert len(facts["plan"]["profiles"]) == 2


def test_an_engine_is_as_accurate_as_eager(engine):
    check_run(engine.folder)


def test_the_command_line_makes_a_video(engine, tmp_path):
    words = ["generate", "--states", "snow", "flowers", "--frames", "17", "--steps", "4", "--engine", engine.folder]
    command("-m", "vstar_engine", *words, "--out", tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").stat().st_size > 0


def test_trtexec_runs_a_plan_that_needs_no_library(tmp_path):
    need("tensorrt")
    if shutil.which("trtexec") is None:
        pytest.skip("needs trtexec in the path")
    plan = build(tmp_path / "e", "tensorrt", "--plugin", "aot").file("unet.plan")
    done = subprocess.run(["trtexec", f"--loadEngine={plan}", "--iterations=2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory):
    """Weights of the mini model's shapes with other values."""
    folder = tmp_path_factory.mktemp("weights")
    command("-m", "vstar_engine.weights.random_checkpoint", "mini", folder / "model.ckpt", 1)
    command("-m", "vstar_engine", "convert", folder / "model.ckpt", folder / "w", "--model", "mini")
    return folder / "w"


@pytest.mark.parametrize("refit", ["yes", "stripped"])
def test_weights_are_swapped_without_a_build(refit, other_weights, tmp_path):
    need("tensorrt")
    built = build(tmp_path / "e", "tensorrt", "--refit", refit)
    if refit == "stripped":
        said = command("-m", "vstar_engine", "generate", "x", "--no-synopsis", "--engine", built.folder, code=9)
        assert "holds no weights; fill it" in said
    words = ["refit", built.folder, "--weights", other_weights, "--out", tmp_path / "refitted"]
    command("-m", "vstar_engine", *words)
    check_run(tmp_path / "refitted", other_weights)


@pytest.mark.parametrize("compatibility", ["capability", "ampere"])
def test_engines_for_more_than_one_gpu(compatibility, tmp_path):
    need("tensorrt")
    check_run(build(tmp_path / "e", "tensorrt", "--compatibility", compatibility).folder)


def test_a_second_build_takes_its_timings_from_the_first(tmp_path):
    need("tensorrt")
    cache = tmp_path / "timings"
    first, second = (build(tmp_path / name, "tensorrt", "--timing-cache", cache) for name in ("a", "b"))
    assert cache.stat().st_size > 0
    assert second.manifest["seconds"] < first.manifest["seconds"]
