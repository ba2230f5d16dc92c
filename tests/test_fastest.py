"""The choice among ways to compute the same: timed once for each case, kept, and never made while a graph is recorded."""

import logging

import pytest
import torch

from vstar_engine.kernels import fastest as module
from vstar_engine.kernels.fastest import fastest


class Timer:
    """A stand-in for a GPU's events: seconds of each call by its name, in the order of the rounds."""

    def __init__(self, **seconds):
        self.seconds, self.timed = seconds, []

    def __call__(self, call):
        name = call()
        self.timed.append(name)
        times = self.seconds[name]
        return times[min(self.timed.count(name), len(times)) - 1]


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(module, "kept", {})


def ways(called=None):
    def call(name):
        if called is not None:
            called.append(name)
        return name

    return {name: lambda name=name: call(name) for name in ("plain", "ours")}


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        ({"plain": [2.0], "ours": [1.0]}, "ours"),
        ({"plain": [1.0], "ours": [2.0]}, "plain"),
        ({"plain": [1.0], "ours": [9.0, 9.0, 0.5, 9.0, 9.0]}, "ours"),
        ({"plain": [1.0], "ours": [1.0]}, "plain"),
    ],
    ids=["ours", "plain", "best of the rounds", "a draw keeps the first"],
)
def test_the_faster_way_is_kept(seconds, wanted, caplog):
    timer = Timer(**seconds)
    with caplog.at_level(logging.INFO, logger="vstar_engine"):
        assert fastest("case", ways(), timer) == wanted
        # both in turn, each as often
        assert timer.timed == ["plain", "ours"] * module.ROUNDS
        assert fastest("case", ways(), timer) == wanted
    assert len(timer.timed) == 2 * module.ROUNDS
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert caplog.messages[0].startswith("case: plain ")


def test_each_case_has_its_own():
    assert fastest("small", ways(), Timer(plain=[1.0], ours=[2.0])) == "plain"
    assert fastest("large", ways(), Timer(plain=[2.0], ours=[1.0])) == "ours"
    assert module.kept == {"small": "plain", "large": "ours"}


def test_nothing_is_timed_before_it_is_warm():
    called = []
    fastest("case", ways(called), Timer(plain=[1.0], ours=[2.0]))
    assert called[: 2 * module.WARM] == ["plain"] * module.WARM + ["ours"] * module.WARM


def test_a_recorded_graph_takes_what_was_kept_and_else_the_first(monkeypatch):
    monkeypatch.setattr(module, "capturing", lambda: True)
    timer = Timer(plain=[2.0], ours=[1.0])
    assert fastest("case", ways(), timer) == "plain"
    assert module.kept == {}
    monkeypatch.setattr(module, "capturing", lambda: False)
    assert fastest("case", ways(), timer) == "ours"
    timed = len(timer.timed)
    monkeypatch.setattr(module, "capturing", lambda: True)
    assert fastest("case", ways(), timer) == "ours"
    assert len(timer.timed) == timed


def test_determinism_and_a_lone_way_are_not_timed():
    timer = Timer(plain=[2.0], ours=[1.0])
    assert fastest("alone", {"plain": lambda: "plain"}, timer) == "plain"
    torch.use_deterministic_algorithms(True)
    try:
        assert fastest("case", ways(), timer) == "plain"
    finally:
        torch.use_deterministic_algorithms(False)
    assert timer.timed == []
    assert module.kept == {}
