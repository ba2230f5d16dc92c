"""Fixtures of the ops' tests."""

import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """Fills memory that is not initialised with NaN, so that an output which an op leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
