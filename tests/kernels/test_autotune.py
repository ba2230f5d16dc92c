"""The choice among candidates that compute the same: timed once for each case, stored, never made while a graph is captured."""

import logging
import subprocess
import sys

import pytest
import torch

from vstar_engine.kernels.gpu import autotune as module
from vstar_engine.kernels.gpu.autotune import autotune


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
def _nothing_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("VSTAR_CACHE", str(tmp_path))
    forgotten(monkeypatch)
    yield
    module.stored.cache_clear()


def candidates(called=None):
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
def test_the_faster_candidate_is_chosen(seconds, wanted, caplog):
    timer = Timer(**seconds)
    with caplog.at_level(logging.INFO, logger="vstar_engine"):
        assert autotune("case", candidates(), timer) == wanted
        # both in turn, each as often
        assert timer.timed == ["plain", "ours"] * module.ROUNDS
        assert autotune("case", candidates(), timer) == wanted
    assert len(timer.timed) == 2 * module.ROUNDS
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert caplog.messages[0].startswith("case: plain ")


def test_each_case_has_its_own():
    assert autotune("small", candidates(), Timer(plain=[1.0], ours=[2.0])) == "plain"
    assert autotune("large", candidates(), Timer(plain=[2.0], ours=[1.0])) == "ours"
    assert module.chosen == {"small": "plain", "large": "ours"}


def test_nothing_is_timed_before_it_is_warm():
    called = []
    autotune("case", candidates(called), Timer(plain=[1.0], ours=[2.0]))
    assert called[: 2 * module.WARM] == ["plain"] * module.WARM + ["ours"] * module.WARM


def test_a_captured_graph_takes_what_was_chosen_and_else_the_first(monkeypatch):
    now = iter([True, False, True])
    monkeypatch.setattr(module, "capturing", lambda: next(now))
    timer = Timer(plain=[2.0], ours=[1.0])
    assert autotune("case", candidates(), timer) == "plain"
    assert module.chosen == {}
    assert autotune("case", candidates(), timer) == "ours"
    timed = len(timer.timed)
    assert autotune("case", candidates(), timer) == "ours"
    assert len(timer.timed) == timed


def test_determinism_and_a_lone_candidate_are_not_timed():
    timer = Timer(plain=[2.0], ours=[1.0])
    assert autotune("alone", {"plain": lambda: "plain"}, timer) == "plain"
    torch.use_deterministic_algorithms(True)
    try:
        assert autotune("case", candidates(), timer) == "plain"
    finally:
        torch.use_deterministic_algorithms(False)
    assert timer.timed == []
    assert module.chosen == {}


PROCESS = """
import sys
from vstar_engine.kernels.gpu.autotune import autotune

timed = []
seconds = {"plain": float(sys.argv[1]), "ours": 1.0}
found = {name: lambda name=name: name for name in seconds}
name = autotune("case", found, lambda call: timed.append(call()) or seconds[timed[-1]])
print(name, len(timed))
"""


def in_a_new_process(plain):
    """Returns what a new process chooses where `plain` takes so many seconds and `ours` one, and how many calls it timed."""
    done = subprocess.run([sys.executable, "-c", PROCESS, str(plain)], capture_output=True, text=True, check=True)
    name, timed = done.stdout.split()
    return name, int(timed)


def test_another_process_computes_by_what_the_first_one_chose():
    assert in_a_new_process(2.0) == ("ours", 2 * module.ROUNDS)
    # it would choose the other, had it timed them
    assert in_a_new_process(0.5) == ("ours", 0)


def forgotten(monkeypatch):
    """Makes the process one that has chosen and read nothing."""
    monkeypatch.setattr(module, "chosen", {})
    module.stored.cache_clear()


def stored_again(monkeypatch):
    """What a next process finds."""
    forgotten(monkeypatch)
    return module.stored()


def test_other_libraries_choose_anew(monkeypatch):
    autotune("case", candidates(), Timer(plain=[2.0], ours=[1.0]))
    assert stored_again(monkeypatch).chosen == {"case": "ours"}
    monkeypatch.setattr(module, "kernel_hash", lambda: "other sources")
    assert stored_again(monkeypatch).chosen == {}
    assert autotune("case", candidates(), Timer(plain=[1.0], ours=[2.0])) == "plain"
    assert len(list(module.stored().path.parent.iterdir())) == 2


def test_a_candidate_that_is_no_more_is_not_taken(monkeypatch):
    module.stored().add("case", "theirs", ["theirs"])
    assert stored_again(monkeypatch).chosen == {"case": "theirs"}
    assert autotune("case", candidates(), Timer(plain=[2.0], ours=[1.0])) == "ours"


def test_what_another_process_chose_meanwhile_stays():
    mine, other = module.Choices(), module.Choices()
    assert other.add("case", "plain", candidates()) == "plain"
    assert mine.add("case", "ours", candidates()) == "plain"
    assert mine.add("more", "ours", candidates()) == "ours"
    assert module.Choices().chosen == {"case": "plain", "more": "ours"}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"of": 1, "chosen": {}}', b"[" * 100000], ids=lambda x: str(x[:9])
)
def test_a_damaged_file_is_named_and_written_anew(content, monkeypatch, caplog):
    autotune("case", candidates(), Timer(plain=[2.0], ours=[1.0]))
    path = module.stored().path
    path.write_bytes(content)
    assert stored_again(monkeypatch).chosen == {}
    (said,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert said.startswith(str(path))
    assert said.endswith("kernels are timed again")
    assert autotune("case", candidates(), Timer(plain=[1.0], ours=[2.0])) == "plain"
    assert stored_again(monkeypatch).chosen == {"case": "plain"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_cache_that_cannot_be_written_is_named_once(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("VSTAR_CACHE", str(tmp_path / "file"))
    for case in ("small", "large"):
        assert autotune(case, candidates(), Timer(plain=[2.0], ours=[1.0])) == "ours"
    (said,) = (record.message for record in caplog.records if "cannot be written" in record.message)
    assert said.endswith("the next process times kernels again")
