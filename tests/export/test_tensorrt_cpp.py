"""The C++ plugin: compiled against TensorRT's headers, and driven to a launch over a driver that only writes it down.

Runs where VSTAR_TENSORRT_HEADERS names a folder with NvInferRuntime.h: a TensorRT installation's, or the public repository's.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import tensorrt_wheels

pytest.importorskip("triton", reason="needs Triton")

from vstar_engine.artifacts.files import sha256
from vstar_engine.backends import tensorrt_plugins
from vstar_engine.errors import EngineError
from vstar_engine.kernels.source_hash import kernel_hash
from vstar_engine.kernels.tensorrt.tactics import RUNS, tactics

ROOT = Path(__file__).parents[2]
HEADERS = os.environ.get("VSTAR_TENSORRT_HEADERS", "")
SOURCES = ROOT / "csrc" / "tensorrt"
DTYPES = ("fp16", "bf16", "fp32")

needs_headers = pytest.mark.skipif(
    not (Path(HEADERS) / "NvInferRuntime.h").is_file(), reason="needs TensorRT's headers: set VSTAR_TENSORRT_HEADERS"
)
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("g++") is None, reason="needs cmake and g++")
pytestmark = needs_cmake


def ran(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def configured(folder, *options):
    return ["cmake", "-S", SOURCES, "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}", *options]


def test_missing_headers_are_said(tmp_path):
    command = [
        str(word) for word in configured(tmp_path, "-DNVINFER_INCLUDE=NVINFER_INCLUDE-NOTFOUND", "-DTENSORRT_ROOT=/none")
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        pytest.skip("this machine has TensorRT's headers where compilers look")
    assert "--plugin aot or python, which need no compiler" in " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """The folder of both libraries, with kernels for sm_80 and heads of 64 in float16, the harness and the driver."""
    folder = tmp_path_factory.mktemp("plugin")
    cuda = "/usr/local/cuda/include"
    if not Path(cuda, "cuda_runtime_api.h").is_file():
        import triton

        cuda = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    options = [f"-DNVINFER_INCLUDE={HEADERS}", f"-DCUDA_INCLUDE={cuda}", "-DARCHITECTURES=80", "-DDTYPES=fp16"]
    ran(*configured(folder, *options))
    ran("cmake", "--build", folder)
    includes = ["-isystem", HEADERS, "-isystem", cuda]
    ran(
        "g++",
        "-std=c++17",
        *includes,
        ROOT / "tests" / "support" / "tensorrt_plugin_harness.cpp",
        "-o",
        folder / "harness",
        "-ldl",
    )
    ran(
        "gcc",
        "-shared",
        "-fPIC",
        ROOT / "tests" / "support" / "fake_cuda.c",
        "-Wl,-soname,libcuda.so.1",
        "-o",
        folder / "libcuda.so.1",
    )
    return folder


def driven(plugin, problems, **environment):
    inherited = {**os.environ, "LD_LIBRARY_PATH": str(plugin), **environment}
    done = ran(plugin / "harness", plugin / "libvstar_tensorrt.so", *problems, env=inherited)
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_headers
@pytest.mark.parametrize(("arch", "kind"), [("80", "cubin"), ("86", "ptx"), ("90", "ptx")])
def test_a_launch_carries_the_problem(plugin, arch, kind):
    # (batch, frames, positions, heads): small and large grids of each tile, and beyond them all
    problems = [(1, 1, 1, 1), (2, 16, 2560, 5), (1, 32, 40, 20), (2, 64, 640, 10), (1, 128, 33, 5), (2, 200, 40, 3)]
    lines = driven(plugin, [f"0 {b} {t} {p} {h} 64 {b}" for b, t, p, h in problems], FAKE_CUDA_ARCH=arch)
    identity = {"creators": 1, "name": "VstarTemporalAttention", "version": "1", "namespace": "vstar", "fields": 0}
    assert lines[0] == identity
    assert len(lines[1]["timing"]) == 64
    assert {line["loaded"] for line in lines if "loaded" in line} == {kind}
    launches = [line for line in lines if "grid" in line]
    table = [tactic for tactic in tactics(64, "fp16", 80) if tactic.run != RUNS[1]]
    for (b, t, p, h), launch in zip(problems, launches, strict=True):
        tactic = min((tactic for tactic in table if t <= (tactic.frames or 4096)), key=lambda tactic: tactic.frames or 4096)
        assert launch["block"] == [32 * tactic.sweep.warps, 1, 1]
        run = launch["integers"][3]
        assert launch["integers"] == [t, p, h, run, t if b > 1 else 0]
        programs = b * h * (-(-p // run) if tactic.frames else p * -(-t // tactic.sweep.rows))
        assert launch["grid"] == [programs, 1, 1]
        if tactic.frames:
            wanted = 2 * 132 * max(1, 16 // tactic.sweep.warps)
            assert run == (RUNS[1] if b * h * -(-p // RUNS[1]) >= wanted else RUNS[0])
        assert launch["pointers"] == [101, 102, 103, 104, 105]
        assert launch["hidden"] == [0, 0]
        assert launch["stream"] == 7
    assert [line for line in lines if "enqueued" in line] == [
        {"formats": True, "typed": 0, "configured": 0, "changed": 0, "enqueued": 0}
    ] * len(problems)


@needs_headers
def test_more_shared_memory_is_asked_for(plugin):
    lines = driven(plugin, ["0 1 128 4 5 64 1"], FAKE_CUDA_ARCH="80")
    (launch,) = [line for line in lines if "grid" in line]
    assert [line["attribute"] for line in lines if "attribute" in line] == [[8, launch["shared"]]]
    assert launch["shared"] > 48 * 1024


@needs_headers
@pytest.mark.parametrize(
    ("problem", "environment", "configured"),
    [
        ("0 1 16 4 5 64 1", {"FAKE_CUDA_ARCH": "75"}, 0),
        ("0 1 16 4 5 64 1", {"FAKE_CUDA_ARCH": "80", "FAKE_CUDA_NO_CONTEXT": "1"}, 0),
        ("0 1 16 4 5 40 1", {"FAKE_CUDA_ARCH": "80"}, -1),
        ("2 1 16 4 5 64 1", {"FAKE_CUDA_ARCH": "80"}, -1),
    ],
    ids=["older GPU", "no context", "head width", "dtype"],
)
def test_what_no_kernel_serves_is_refused(plugin, problem, environment, configured):
    lines = driven(plugin, [problem], **environment)
    assert lines[-1] == {"formats": True, "typed": 0, "configured": configured, "changed": -1, "enqueued": -1}
    assert not any("grid" in line for line in lines)


@needs_headers
def test_the_libraries_need_no_library_of_nvidias(plugin):
    for name in ("libvstar_tensorrt.so", "libvstar_tensorrt_autoload.so"):
        undefined = ran("nm", "-D", "--undefined-only", plugin / name).stdout
        assert not any(word in undefined for word in ("nvinfer", " cu", "cuda"))
    defined = ran("nm", "-D", "--defined-only", plugin / "libvstar_tensorrt.so").stdout
    exported = {line.split()[-1] for line in defined.splitlines()}
    assert {"getCreators", "setLoggerFinder"} <= exported
    assert not any("vstar_kernel" in symbol for symbol in exported)


@needs_headers
def test_the_library_says_which_kernels_it_holds(plugin, tmp_path, monkeypatch):
    path = plugin / "libvstar_tensorrt.so"
    monkeypatch.setenv(tensorrt_plugins.LIBRARY, str(path))
    assert tensorrt_plugins.versions("cpp") == {"cpp plugin": sha256(path)}
    other = tmp_path / path.name
    other.write_bytes(path.read_bytes().replace(kernel_hash().encode(), b"0" * 64))
    monkeypatch.setenv(tensorrt_plugins.LIBRARY, str(other))
    with pytest.raises(EngineError, match="was built from other kernels"):
        tensorrt_plugins.versions("cpp")


@needs_headers
def test_the_library_that_registers_finds_the_plugin_beside_it(plugin, tmp_path):
    """Wherever both are: a server's model repository takes copies of them."""
    for name in ("libvstar_tensorrt.so", "libvstar_tensorrt_autoload.so"):
        shutil.copy(plugin / name, tmp_path)
    opened = f"import ctypes; ctypes.CDLL({str(tmp_path / 'libvstar_tensorrt_autoload.so')!r})"
    assert "vstar: no TensorRT is loaded in this process" in ran(sys.executable, "-c", opened).stderr
    (tmp_path / "libvstar_tensorrt.so").unlink()
    alone = subprocess.run([sys.executable, "-c", opened], capture_output=True, text=True)
    assert "libvstar_tensorrt.so: cannot open shared object file" in alone.stderr


@needs_headers
def test_tensorrt_for_rtx_takes_the_library(plugin, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the onnxscript package")
    from support.onnx_blocks import block

    environment = {**tensorrt_wheels.rtx(), "VSTAR_TENSORRT_PLUGIN": str(plugin / "libvstar_tensorrt.so")}
    jobs = [
        {
            "onnx": str(block(tmp_path / f"{head_dim}.onnx", head_dim=head_dim)),
            "out": str(tmp_path / f"{head_dim}.plan"),
            "nodes": 2,
            "plugin": "cpp",
            "frames": [16, 64],
            "ranges": {"batch": [1, 2, 4], "positions": [1, 48, 160]},
            "targets": ["SM80", "SM86", "SM89", "SM120"],
        }
        for head_dim in (64, 32)
    ]
    served, refused = tensorrt_wheels.child("tensorrt_rtx_build.py", environment, jobs=jobs)
    assert served["plugin_layers"] == 2
    assert served["bytes"] > 0
    # there is no kernel for such heads in the library
    assert "cannot build 32.onnx" in refused["error"]
