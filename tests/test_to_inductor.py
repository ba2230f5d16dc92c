"""AOTInductor packages: what the exporter says where it cannot make one. Their numbers: test_backends."""

import dataclasses
import shutil

import pytest
import torch
import torch._inductor
from accuracy import assert_as_accurate
from torch._inductor.exc import InvalidCxxCompiler

from vstar_engine import checkpoint
from vstar_engine.backends import eager as eager_unet
from vstar_engine.backends.inputs import full
from vstar_engine.config import MODELS
from vstar_engine.errors import ExportError
from vstar_engine.export import to_inductor
from vstar_engine.export.settings import Settings


def test_a_machine_without_a_compiler(mini_weights, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise InvalidCxxCompiler("g++")

    monkeypatch.setattr(torch.export, "export", lambda *args, **options: None)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", refuse)
    with pytest.raises(ExportError, match="cannot be compiled: Compiler: g\\+\\+ is not found"):
        to_inductor.build(Settings(MODELS["mini"], "inductor"), checkpoint.Weights(mini_weights), tmp_path, lambda line: None)


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
