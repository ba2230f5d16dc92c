"""Fixtures of the exporters' tests."""

import pytest

from support.fake_builder import Builder
from vstar_engine.export import builders
from vstar_engine.weights import checkpoint


@pytest.fixture
def weights(mini_weights):
    return checkpoint.Weights(mini_weights)


@pytest.fixture
def builder(monkeypatch):
    """Stands in for the module that builds for any back end."""
    made = Builder()
    monkeypatch.setattr(builders, "import_module", lambda module, package: made)
    return made
