"""AOTInductor packages: what the exporter says where it cannot make one. Their numbers: test_backends."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch
import torch._inductor
from accuracy import assert_as_accurate
from engines import engine_at
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from vstar_engine import checkpoint
from vstar_engine.backends import eager as eager_unet
from vstar_engine.backends import inductor
from vstar_engine.backends.inputs import full
from vstar_engine.built import Artifact
from vstar_engine.config import MODELS
from vstar_engine.errors import EngineError, ExportError, OutputError
from vstar_engine.export import to_inductor
from vstar_engine.export.settings import Settings
from vstar_engine.kernels import native


def test_a_machine_without_a_compiler(mini_weights, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise InvalidCxxCompiler("g++")

    monkeypatch.setattr(torch.export, "export", lambda *args, **options: None)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", refuse)
    with pytest.raises(ExportError, match="cannot be compiled: Compiler: g\\+\\+ is not found"):
        to_inductor.build(Settings(MODELS["mini"], "inductor"), checkpoint.Weights(mini_weights), tmp_path, lambda line: None)


def test_a_full_disk_under_the_compiler(mini_weights, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise CppCompileError(["g++"], "ld: final link failed: No space left on device")

    monkeypatch.setattr(torch.export, "export", lambda *args, **options: None)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", refuse)
    with pytest.raises(OutputError, match=r"no space is left for the compiler's files in .*TORCHINDUCTOR_CACHE_DIR and TMPDIR"):
        to_inductor.build(Settings(MODELS["mini"], "inductor"), checkpoint.Weights(mini_weights), tmp_path, lambda line: None)


# PyTorch writes the package itself, of a small network and of a library that is larger than files may be here
FULL_DISK = """
import dataclasses, pathlib, resource, sys, torch
from vstar_engine import cli
from vstar_engine.export import network, to_inductor
plain, folder = network.unet, pathlib.Path(sys.argv[1])
(folder / "model.so").write_bytes(bytes(4 * 2**20))

def small(*given):
    described = plain(*given)
    inputs, batch = {"input": torch.zeros(2, 3)}, torch.export.Dim("batch", max=8)
    return dataclasses.replace(described, module=torch.nn.Linear(3, 3), inputs=inputs, dims={"input": {0: batch}})

to_inductor.unet = small
to_inductor.eager.load = lambda *given, **named: torch.nn.Linear(3, 3)
torch._inductor.aot_compile = lambda *given, **named: [str(folder / "model.so")]
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
words = ["build", "--model", "mini", "--backend", "inductor", "--size", "32x64", "--out", str(folder / "engine")]
sys.exit(cli.main(words))
"""


def test_a_disk_that_fills_up_under_the_package_is_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert f"cannot write {tmp_path / 'engine'}: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.so"]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
def test_a_package_of_the_golden_network_is_as_accurate_as_eager(golden, tmp_path):
    case = golden.case("unet_plain_shared")
    spec = dataclasses.replace(MODELS["mini"], unet=checkpoint.spec_from_official(golden.config(case, "unet_params")))
    weights = {checkpoint.UNET + name: tensor for name, tensor in golden.weights(case).items()}
    to_inductor.build(Settings(spec, "inductor"), weights, tmp_path, lambda line: None)
    package = torch._inductor.aoti_load_package(str(tmp_path / to_inductor.PACKAGE))
    eager, exact = (eager_unet.load(spec, weights, device=torch.device("cpu"), dtype=x) for x in (torch.float32, torch.float64))
    for batch, frames in ((1, 1), (2, 5), (2, 17)):
        given = (
            torch.randn(batch, 4, frames, 4, 8),
            torch.randint(0, 1000, (batch, frames)),
            torch.randn(batch, frames, 77, spec.unet.context_dim),
            torch.randint(8, 30, (batch,)),
            torch.randn(batch, spec.unet.levels, frames),
        )
        with torch.inference_mode():
            wide = exact(given[0].double(), given[1], given[2].double(), *given[3:])
            assert_as_accurate(package(**full(*given)), eager(*given), wide)


def test_a_guess_counts_the_weights_of_the_unet_alone():
    guess = to_inductor.estimate(Settings(MODELS["videocrafter2"], "inductor", dtype=torch.float16))
    assert guess.disk == 2 * 1_413_284_420
    assert guess.memory > guess.disk
    # what the mini model's package took on two quiet cores
    assert to_inductor.estimate(Settings(MODELS["mini"], "inductor")).seconds == pytest.approx(90, rel=0.1)


def test_a_package_is_refused_where_its_ops_have_no_library(tmp_path, monkeypatch):
    engine = Artifact.open(engine_at(tmp_path / "e", facts={"ops": ["vstar.linear.default"]}))
    monkeypatch.setattr(native, "status", lambda: (False, "no compiler"))
    with pytest.raises(EngineError, match="calls the CPU kernels: no compiler"):
        inductor.load(engine, device=torch.device("cpu"), dtype=torch.float32)
