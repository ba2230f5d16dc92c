"""Fixtures shared by the tests."""

from pathlib import Path

import pytest
import torch

from vstar_engine import Engine, bundled
from vstar_engine.config import MODELS
from vstar_engine.golden import Golden

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, PyTorch finds none here"))


@pytest.fixture(scope="session")
def golden():
    return Golden(GOLDEN)


@pytest.fixture(scope="session")
def mini_weights():
    return bundled.weights(MODELS["mini"])


@pytest.fixture(scope="session")
def mini(mini_weights):
    return Engine.load("mini", weights=mini_weights)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
