"""AOTInductor packages: what the exporter says where it cannot make one. Their numbers: test_backends."""

import pytest
import torch
import torch._inductor
from torch._inductor.exc import InvalidCxxCompiler

from vstar_engine import checkpoint
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


def test_a_guess_counts_the_weights_of_the_unet_alone():
    guess = to_inductor.estimate(Settings(MODELS["videocrafter2"], "inductor", dtype=torch.float16))
    assert guess.disk == 2 * 1_413_284_420
    assert guess.memory > guess.disk
