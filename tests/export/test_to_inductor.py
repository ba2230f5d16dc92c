"""AOTInductor packages: what the exporter says where it cannot make one. Their numbers: test_backends."""

import dataclasses
import shutil
import subprocess
import sys
import types

import pytest
import torch
import torch._inductor
from torch._inductor import cpp_builder, cpu_vec_isa
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch.utils.flop_counter import FlopCounterMode

from support.accuracy import assert_as_accurate, relative_error
from support.engines import engine_at
from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.backends import eager as eager_unet
from vstar_engine.backends import inductor
from vstar_engine.backends.inputs import shared
from vstar_engine.config.models import MODELS
from vstar_engine.errors import EngineError, ExportError, OutputError
from vstar_engine.export import to_inductor
from vstar_engine.export.build_settings import Settings
from vstar_engine.export.builders import silent
from vstar_engine.kernels.cpu import library
from vstar_engine.weights import checkpoint, key_map, official_config


@pytest.fixture
def packaged(mini_weights, tmp_path, monkeypatch):
    """A call that builds the mini model's package, of nothing traced, by a stand-in for PyTorch's compiler."""

    def build(compiler):
        network = types.SimpleNamespace(described=dict)
        monkeypatch.setattr(to_inductor, "traced", lambda *given: (network, None))
        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiler)
        to_inductor.build(Settings(MODELS["mini"], "inductor"), checkpoint.Weights(mini_weights), tmp_path, silent)

    return build


def test_a_machine_without_a_compiler(packaged):
    def refuse(*args, **options):
        raise InvalidCxxCompiler("g++")

    with pytest.raises(ExportError, match="cannot be compiled: Compiler: g\\+\\+ is not found"):
        packaged(refuse)


def test_a_package_needs_no_more_than_the_vectors_that_its_identity_names(packaged):
    flags = []

    def look(*args, **options):
        flags.extend(cpp_builder.CppTorchOptions(vec_isa=cpu_vec_isa.VecAVX512()).get_cflags())
        raise InvalidCxxCompiler("g++")

    with pytest.raises(ExportError):
        packaged(look)
    assert "O3" in flags
    assert not [flag for flag in flags if flag.startswith(("march", "mcpu"))]


def test_a_full_disk_under_the_compiler(packaged):
    def refuse(*args, **options):
        raise CppCompileError(["g++"], "ld: final link failed: No space left on device")

    with pytest.raises(OutputError, match=r"no space is left for the compiler's files in .*TORCHINDUCTOR_CACHE_DIR and TMPDIR"):
        packaged(refuse)


# PyTorch writes the package itself, of a small network and of a library that is larger than files may be here
FULL_DISK = """
import dataclasses, pathlib, resource, sys, torch
from vstar_engine.commands import main as cli
from vstar_engine.export import to_inductor, traced_networks
plain, folder = traced_networks.unet, pathlib.Path(sys.argv[1])
(folder / "model.so").write_bytes(bytes(4 * 2**20))

def small(*given):
    described = plain(*given)
    inputs, batch = {"input": torch.zeros(2, 3)}, torch.export.Dim("batch", max=8)
    return dataclasses.replace(described, module=torch.nn.Linear(3, 3), inputs=inputs, dims={"input": {0: batch}})

to_inductor.unet, to_inductor.with_texts_axis = small, lambda network: network
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


@pytest.fixture(scope="module")
def tiny(golden):
    """A golden network as a model, and its weights by official names."""
    case = golden.case("unet_plain_shared")
    spec = dataclasses.replace(MODELS["mini"], unet=official_config.spec_from_official(golden.config(case, "unet_params")))
    return spec, {key_map.UNET + name: tensor for name, tensor in golden.weights(case).items()}


def inputs(spec, texts, batch, frames):
    """Everything differs from video to video and from text to text."""
    return (
        torch.randn(batch, 4, frames, 4, 8),
        torch.randint(0, 1000, (batch, frames)),
        torch.randn(texts * batch, frames, 77, spec.context_dim),
        torch.randint(8, 30, (batch,)),
        torch.randn(batch, spec.levels, frames),
    )


def test_what_comes_before_the_first_text_is_traced_once_for_all_texts(tiny):
    spec, weights = tiny
    network, program = to_inductor.traced(Settings(spec, "inductor", size=None), weights, lambda line: None)
    assert network.described()["outputs"][0]["shape"][0] == "texts*batch"
    eager = eager_unet.load(spec, weights, device=torch.device("cpu"), dtype=torch.float32)
    # guards tell sizes of 1 apart, as a package does not
    graph = program.module(check_guards=False)
    for texts, batch, frames in ((1, 1, 1), (2, 1, 3), (1, 2, 2), (2, 2, 4), (3, 1, 2)):
        given = inputs(spec.unet, texts, batch, frames)
        with torch.no_grad(), FlopCounterMode(display=False) as ours:
            made = graph(**shared(*given))
        with torch.no_grad(), FlopCounterMode(display=False) as theirs:
            wanted = eager(*given)
        assert relative_error(made, wanted) < 1e-5
        # its convolutions
        assert ours.get_total_flops() == theirs.get_total_flops() > 0


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
def test_a_package_of_the_golden_network_is_as_accurate_as_eager(tiny, tmp_path):
    spec, weights = tiny
    to_inductor.build(Settings(spec, "inductor"), weights, tmp_path, lambda line: None)
    package = torch._inductor.aoti_load_package(str(tmp_path / to_inductor.PACKAGE))
    eager, exact = (eager_unet.load(spec, weights, device=torch.device("cpu"), dtype=x) for x in (torch.float32, torch.float64))
    for batch, frames in ((1, 1), (2, 5), (2, 17)):
        given = inputs(spec.unet, 1, batch, frames)
        with torch.inference_mode():
            wide = exact(given[0].double(), given[1], given[2].double(), *given[3:])
            assert_as_accurate(package(**shared(*given)), eager(*given), wide)


def test_a_guess_counts_the_weights_of_the_unet_alone():
    guess = to_inductor.estimate(Settings(MODELS["videocrafter2"], "inductor", dtype=torch.float16))
    assert guess.disk == 2 * 1_413_284_420
    assert guess.memory > guess.disk
    # what the mini model's package took on two quiet cores
    assert to_inductor.estimate(Settings(MODELS["mini"], "inductor")).seconds == pytest.approx(90, rel=0.1)


def test_a_package_is_refused_where_its_ops_have_no_library(tmp_path, monkeypatch):
    engine = BuiltEngine.open(engine_at(tmp_path / "e", facts={"ops": ["vstar.linear.default"]}))
    monkeypatch.setattr(library, "status", lambda: (False, "no compiler"))
    with pytest.raises(EngineError, match="calls the CPU kernels: no compiler"):
        inductor.load(engine, device=torch.device("cpu"), dtype=torch.float32)


def test_a_package_of_before_is_refused(tmp_path):
    of_then = {"unet": {"inputs": [{"name": "context", "shape": ["batch", "frames", 77, 64]}]}}
    for facts in (of_then, {}):
        engine = BuiltEngine.open(engine_at(tmp_path / str(len(facts)), facts=facts))
        with pytest.raises(
            EngineError, match="before packages took several texts for each video; rebuild it: vstar-engine build"
        ):
            inductor.load(engine, device=torch.device("cpu"), dtype=torch.float32)
