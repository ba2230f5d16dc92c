"""Built back ends: whole videos against eager, the command line, damaged files, absent libraries."""

import json
import os
import shutil
import subprocess
import sys
import types
from functools import partial

import pytest
import torch

from support.engines import engine_at
from vstar_engine import Engine, Sampling, Tar
from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.backends import BACKENDS, backend_named
from vstar_engine.backends.onnxruntime import check_links, library
from vstar_engine.bench.harness.rows import read
from vstar_engine.commands.main import main
from vstar_engine.config.models import MODELS
from vstar_engine.config.request import Request
from vstar_engine.errors import DeviceError, EngineError, MissingLibrary

SPEC = MODELS["mini"]
SIZE = (32, 64)


@pytest.fixture(scope="module", params=["onnx_engine", "inductor_engine"])
def artifact(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def engine(artifact):
    return Engine.load(engine=artifact)


def test_links_that_onnx_runtime_does_not_follow_are_told(tmp_path):
    folder = engine_at(tmp_path / "e", file="unet.onnx", backend="onnxruntime")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_bytes(b"weights")
    (folder / "unet.onnx.data").symlink_to(tmp_path / "blobs" / "1")
    artifact = BuiltEngine.open(folder)
    with pytest.raises(EngineError, match=r"unet\.onnx\.data is a link out of the network's folder, .*: cp -rL \S*/e NEW"):
        check_links(artifact)
    # as a cache of snapshots has them
    (folder / "unet.onnx").rename(tmp_path / "blobs" / "2")
    (folder / "unet.onnx").symlink_to(tmp_path / "blobs" / "2")
    check_links(artifact)


def test_a_video_is_the_one_that_eager_makes(engine, mini):
    settings = {"frames": 5, "seed": 4, "sampling": Sampling(steps=3), "tar": Tar(until_step=1)}
    ours, eager = engine.generate(["snow", "flowers"], **settings), mini.generate(["snow", "flowers"], size=SIZE, **settings)
    assert ours.frames.shape == eager.frames.shape == (5, *SIZE, 3)
    off = abs(ours.frames.astype(int) - eager.frames.astype(int))
    assert off.max() <= 1
    assert (off > 0).mean() < 0.01
    assert ours.provenance["backend"] == engine.artifact.identity["backend"]


def test_videos_of_a_batch_are_those_that_eager_makes(engine, mini):
    """One of them has no second branch, and its own TAR."""
    plain = Request(("snow", "flowers"), 5, 4, SIZE, Sampling(steps=3, guidance=1.0), None)
    requests = [plain, Request(("a red ball",), 5, 7, SIZE, Sampling(steps=3), Tar({0: 2.0}, until_step=1))]
    for ours, request in zip(engine.run_batch(requests), requests, strict=True):
        off = abs(ours.frames.astype(int) - mini.run(request).frames.astype(int))
        assert off.max() <= 1
        assert (off > 0).mean() < 0.01


def test_the_command_line_runs_an_engine_in_a_new_process(artifact, tmp_path):
    words = ["generate", "--states", "snow", "--frames", "4", "--steps", "2", "--engine", str(artifact.folder), "--json"]
    code = (
        "import sys, torch; from vstar_engine.commands import main as cli\n"
        "torch.export.export = torch.compile = None  # neither may be needed\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PATH": "", "CXX": "none"}  # nor a compiler
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--out", str(tmp_path / "a.mp4")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["model"], made["backend"], made["built"]) == ("mini", artifact.identity["backend"], artifact.name)
    assert made["request"]["size"] == list(SIZE)


def test_a_step_is_measured_against_eager(artifact, tmp_path):
    words = ["--engines", str(artifact.folder), "--frames", "2", "--rounds", "1", "--out", str(tmp_path / "rows.jsonl")]
    assert main(["bench", "engine", *words]) == 0
    rows = read([tmp_path / "rows.jsonl"])
    assert [row.provider for row in rows] == ["eager", artifact.identity["backend"]]
    assert all(row.numbers["median"] > 0 for row in rows)


def test_the_manifest_says_what_goes_in_and_out(artifact):
    facts = artifact.manifest["facts"]["unet"]
    assert [entry["name"] for entry in facts["inputs"]] == ["latents", "timestep", "context", "fps", "tar"]
    assert facts["inputs"][0] == {"name": "latents", "dtype": "float32", "shape": ["batch", 4, "frames", 4, 8]}
    assert facts["inputs"][4] == {"name": "tar", "dtype": "float32", "shape": ["batch", SPEC.unet.levels, "frames"]}
    # a package computes once what the texts of a video share
    texts = ["texts"] if artifact.identity["backend"] == "inductor" else []
    assert facts["inputs"][2]["shape"] == [*texts, "batch", "frames", 77, SPEC.unet.context_dim]
    rows = "*".join([*texts, "batch"])
    assert facts["outputs"] == [{"name": "eps", "dtype": "float32", "shape": [rows, 4, "frames", 4, 8]}]


def test_wrong_clips_end_in_one_sentence(artifact, capsys):
    words = ["generate", "x", "--no-synopsis", "--engine", str(artifact.folder)]
    assert main([*words, "--size", "32x32"]) == 9
    assert "--size 32x32" in capsys.readouterr().err
    assert main([*words, "--dtype", "float16"]) == 9
    assert "for dtype float32, not float16; rebuild it" in capsys.readouterr().err


def test_a_file_that_onnx_runtime_cannot_open(tmp_path):
    import support.onnx_packages  # noqa: F401 - skips where they are missing

    here = backend_named("onnxruntime").requirements(torch.device("cpu"), {})
    folder = engine_at(tmp_path / "e", file="unet.onnx", backend="onnxruntime", **here)
    with pytest.raises(EngineError, match="cannot be opened by ONNX Runtime"):
        Engine.load(engine=folder)


@pytest.mark.parametrize(
    ("file", "cut", "complaint"),
    [
        ("unet.onnx", 100, r"unet.onnx has \d+ bytes where manifest.json says"),
        ("unet.onnx.data", None, "unet.onnx.data is missing, though manifest.json lists it"),
    ],
)
def test_damaged_onnx_files_are_refused(onnx_engine, tmp_path, file, cut, complaint):
    folder = shutil.copytree(onnx_engine.folder, tmp_path / "e")
    if cut is None:
        (folder / file).unlink()
    else:
        os.truncate(folder / file, cut)
    with pytest.raises(EngineError, match=complaint):
        Engine.load(engine=folder)


def test_a_device_without_a_provider(tmp_path):
    import support.onnx_packages  # noqa: F401 - skips where they are missing

    if "CUDAExecutionProvider" in library().get_available_providers():
        pytest.skip("this onnxruntime has its CUDA provider")
    with pytest.raises(DeviceError, match="no CUDAExecutionProvider for device cuda:0; install onnxruntime-gpu"):
        backend_named("onnxruntime").load(None, device=torch.device("cuda", 0), dtype=torch.float32)


def test_a_provider_that_does_not_start_is_not_swapped_for_the_cpus(tmp_path, monkeypatch):
    import support.onnx_packages  # noqa: F401 - skips where they are missing

    runtime, calls = library(), []
    started = ["CPUExecutionProvider"]
    session = types.SimpleNamespace(get_providers=lambda: started, disable_fallback=lambda: calls.append("no fallback"))
    monkeypatch.setattr(runtime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(runtime, "InferenceSession", lambda *given, **named: session)
    artifact = BuiltEngine.open(engine_at(tmp_path / "e", file="unet.onnx", backend="onnxruntime"))
    load = partial(backend_named("onnxruntime").load, artifact, device=torch.device("cuda", 0), dtype=torch.float32)
    with pytest.raises(DeviceError, match="CUDAExecutionProvider, but it does not start on device cuda:0"):
        load()
    started.insert(0, "CUDAExecutionProvider")
    load()
    assert calls == ["no fallback"]


def test_a_library_that_is_missing_is_named(modules):
    modules({"onnxruntime": None})
    with pytest.raises(MissingLibrary, match=r"pip install onnx"):
        library()


@pytest.mark.parametrize("name", BACKENDS)
def test_every_back_end_is_there(name):
    assert callable(backend_named(name).load)


def test_a_package_calls_the_fused_ops(inductor_engine):
    called = inductor_engine.manifest["facts"]["ops"]
    assert called == [f"vstar.{op}.default" for op in ("groupnorm_silu", "linear", "temporal_attention")]
