"""The same seed gives the same video whatever the program around the engine has set in PyTorch."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from vstar_engine import Engine, Sampling
from vstar_engine.config.models import MODELS
from vstar_engine.machine import memory

SMALL = {"frames": 2, "size": (32, 32), "sampling": Sampling(steps=1), "seed": 3}


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.fixture(scope="module")
def engine():
    return Engine.load("mini")


@pytest.fixture(scope="module")
def plain(engine):
    return engine.generate(["snow", "flowers"], **SMALL).frames


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_video_is_the_same(setting, engine, plain):
    memory.activation_bytes.cache_clear()
    memory.frame_bytes.cache_clear()
    with SETTINGS[setting]():
        assert np.array_equal(engine.generate(["snow", "flowers"], **SMALL).frames, plain)


def test_an_engine_loads_beside_them(plain):
    with default_device("meta"), default_dtype(torch.float64), torch.autocast("cpu", torch.bfloat16):
        loaded = Engine.load("mini")
    assert np.array_equal(loaded.generate(["snow", "flowers"], **SMALL).frames, plain)


def test_planning_memory_sets_nothing(monkeypatch):
    memory.frame_bytes.cache_clear()
    monkeypatch.setattr(
        torch, "set_default_dtype", lambda dtype: pytest.fail(f"the process's default dtype was set to {dtype}")
    )
    assert memory.frame_bytes(MODELS["mini"], 32, 32, torch.float16) > 0
