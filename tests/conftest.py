"""Fixtures shared by the tests."""

import os
import shutil
import sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import support.prepared  # noqa: F401 - sets what OpenMP reads as PyTorch is loaded

# isort: split
import pytest
import torch

from support import fake_graphs
from vstar_engine import Engine
from vstar_engine.config.models import MODELS
from vstar_engine.export import build_engine
from vstar_engine.export.build_settings import Settings
from vstar_engine.machine import memory
from vstar_engine.verification.golden import Golden
from vstar_engine.weights import bundled
from vstar_engine.weights.checkpoint import Weights

GOLDEN = Path(__file__).parent / "golden"
# files that take a core for long go first, so that none of them is left when the other cores are done
LONG = (
    "test_backends.py",
    "test_aot.py",
    "test_to_onnx.py",
    "test_verify.py",
    "test_commands.py",
    "test_graphs_engine.py",
    "test_roofline.py",
    "test_pipeline.py",
    "test_on_gpu.py",
    "test_mini_model.py",
    # after the engine that it reads is built
    "test_tensorrt_rtx.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=20, help="of the long reliability tests; `make test-reliability`: 1000")
    parser.addoption(
        "--timed", action="store_true", help="hold the server to its figures: for a machine on which nothing else runs"
    )
    parser.addoption(
        "--soak", type=float, default=1.0, help="minutes of the long reliability tests; `make test-reliability`: 30"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; without one see `make test-interpreter`"))


@pytest.fixture(scope="session")
def golden():
    return Golden(GOLDEN)


@pytest.fixture(scope="session")
def mini_weights():
    return bundled.weights(MODELS["mini"])


@pytest.fixture(scope="session")
def mini(mini_weights):
    return Engine.load("mini", weights=mini_weights)


@pytest.fixture(scope="session")
def onnx_engine(mini_weights, tmp_path_factory):
    """The mini model built for ONNX Runtime."""
    import support.onnx_packages  # noqa: F401 - skips where they are missing

    return built("onnxruntime", mini_weights, tmp_path_factory)


@pytest.fixture(scope="session")
def inductor_engine(mini_weights, tmp_path_factory):
    """The mini model built by AOTInductor."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    return built("inductor", mini_weights, tmp_path_factory)


def built(backend, weights, tmp_path_factory):
    """Builds an engine at 32x64 pixels in a folder that all of a run's processes share: the second finds it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{backend}.engine"
    return build_engine.build(Settings(MODELS["mini"], backend, size=(32, 64)), Weights(weights), folder)


@pytest.fixture
def graphs(monkeypatch):
    """The class of a stand-in's CUDA graphs, in the place of PyTorch's."""
    return fake_graphs.install(monkeypatch)


@pytest.fixture
def modules(monkeypatch):
    """A call that puts modules in the place of installed ones; None makes one a missing library."""

    def replace(stand_ins):
        for name, module in stand_ins.items():
            if module is not None and not hasattr(module, "__spec__"):
                module.__spec__ = ModuleSpec(name, None)  # by which importlib finds that it is installed
            monkeypatch.setitem(sys.modules, name, module)

    return replace


@pytest.fixture
def some_gpu(monkeypatch):
    """A call that makes PyTorch name a GPU, and make it current, where there is none."""

    def named(name="NVIDIA H200", capability=(9, 0)):
        answers = {"get_device_name": name, "get_device_capability": capability, "device": nullcontext()}
        for question, answer in answers.items():
            monkeypatch.setattr(torch.cuda, question, lambda device, answer=answer: answer)

    return named


@pytest.fixture
def free_memory(monkeypatch):
    """A call that says how many bytes any device has free."""
    return lambda free: monkeypatch.setattr(memory, "available_bytes", lambda device: free)


@pytest.fixture
def free_disk(monkeypatch):
    """A call that says how many bytes any disk has free."""
    return lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
