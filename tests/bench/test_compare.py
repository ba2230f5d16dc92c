"""`bench compare`: a verdict that respects the spread, and catches what was planted."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vstar_engine.bench.__main__ import main
from vstar_engine.bench.commands import compare
from vstar_engine.bench.commands.compare import BROKEN, FASTER, GONE, MENDED, NEW, SAME, SLOWER, Span, verdict
from vstar_engine.bench.harness.contest import Contest, Pace, Provider, hold
from vstar_engine.bench.harness.rows import OK, SKIPPED, WRONG, ResultFile, ResultRow

EXACT = torch.ones(4)


def span(median: float | None, spread: float = 0.01, status: str = OK) -> Span:
    return Span("t", median, (median or 0) * (1 - spread), (median or 0) * (1 + spread), status)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (span(1.0), span(1.5), SLOWER),
        (span(1.5), span(1.0), FASTER),
        (span(1.0), span(1.02), SAME),
        (span(1.0, 0.3), span(1.5, 0.3), SAME),
        (span(1.0, 0.001), span(1.02, 0.001), SAME),
        (span(1.0), span(None, status=WRONG), BROKEN),
        (span(None, status=WRONG), span(1.0), MENDED),
        (span(None, status=WRONG), span(None, status=WRONG), WRONG),
        (None, span(1.0), NEW),
        (span(1.0), None, GONE),
    ],
    ids=["slower", "faster", "same", "wide", "below the threshold", "broken", "mended", "still wrong", "new", "gone"],
)
def test_verdicts(before: Span | None, after: Span | None, says: str) -> None:
    assert verdict(before, after) == says


def test_runs_of_one_side_are_pooled() -> None:
    rows = [ResultRow("t", {}, "a", numbers={"median": m, "p20": m - 0.1, "p80": m + 0.1}) for m in (1.0, 3.0, 2.0)]
    assert Span.of(rows) == Span("t: : a", 2.0, 0.9, 3.1, OK)
    assert Span.of([*rows, ResultRow("t", {}, "a", status=WRONG)]).status == WRONG
    assert Span.of([*rows, ResultRow("t", {}, "a", status=SKIPPED)]).status == OK


def measured(path: Path, call: Callable[[], Tensor]) -> Path:
    """Holds a contest between `call` and one that stays as it is."""

    def steady() -> Tensor:
        time.sleep(0.004)
        return EXACT

    providers = [Provider("ours", lambda: call), Provider("other", lambda: steady)]
    contest = Contest("t", {}, torch.float32, torch.device("cpu"), providers, lambda _, x: float((x - EXACT).norm()), 1e-6)
    with ResultFile(path, "test") as rows:
        hold(contest, rows, Pace(rounds=9, warmup=0))
    return path


def sleeping(seconds: float, value: float = 1.0) -> Callable[[], Tensor]:
    def call() -> Tensor:
        time.sleep(seconds)
        return value * EXACT

    return call


def test_a_planted_slowness_and_a_planted_fault_are_caught(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = measured(tmp_path / "good.jsonl", sleeping(0.002))
    slow = measured(tmp_path / "slow.jsonl", sleeping(0.05))
    wrong = measured(tmp_path / "wrong.jsonl", sleeping(0.002, 1.01))
    assert main(["compare", str(good), str(good)]) == 0
    assert "nothing got slower" in capsys.readouterr().out
    assert main(["compare", str(good), str(slow)]) == 1
    said = capsys.readouterr().out
    assert "slower, broken or gone: t: : ours\n" in said
    assert "| slower |" in said
    assert main(["compare", str(good), str(wrong)]) == 1
    assert "| WRONG |" in capsys.readouterr().out
    assert main(["compare", str(slow), str(good)]) == 0
    assert "| faster |" in capsys.readouterr().out


def written(path: Path, median: float, *providers: str, complete: bool = True, **machine: object) -> str:
    rows = ResultFile(path, "test")
    rows.machine |= machine
    for name in providers:
        rows.write(ResultRow("t", {}, name, numbers={"median": median, "p20": median, "p80": median}))
    if complete:
        rows.__exit__(None, None, None)
    return str(path)


def test_another_machine_is_no_regression_and_other_versions_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = written(tmp_path / "a", 1.0, "ours", gpu="H200", torch="2.11.0")
    assert main(["compare", first, written(tmp_path / "b", 2.0, "ours", gpu="H100", torch="2.11.0")]) == 0
    said = capsys.readouterr().out
    assert "| 2.000 | another machine |" in said
    assert "warning: two machines, whose ratios are no regressions; they differ in gpu (H200; then H100)\n" in said
    assert main(["compare", first, written(tmp_path / "c", 2.0, "ours", gpu="H200", torch="2.13.0")]) == 1
    said = capsys.readouterr().out
    assert "| slower |" in said
    assert "warning: the sides differ in torch (2.11.0; then 2.13.0)\n" in said
    assert main(["compare", first, first]) == 0
    assert "warning" not in capsys.readouterr().out


def test_what_disappeared_fails_and_what_was_interrupted_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = written(tmp_path / "a", 1.0, "ours", "other")
    second = written(tmp_path / "b", 1.0, "ours", "new", complete=False)
    assert main(["compare", first, second]) == 1
    said = capsys.readouterr().out
    assert "| 1 s [1 s, 1 s] | 1 s [1 s, 1 s], interrupted |" in said
    assert "slower, broken or gone: t: : other\n" in said
    assert "| t: : new |  | 1 s [1 s, 1 s], interrupted |  | only in the second |" in said


def test_nothing_in_common_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        with ResultFile(tmp_path / name, "test") as rows:
            rows.write(ResultRow(name, {}, "ours", numbers={"median": 1.0, "p20": 1.0, "p80": 1.0}))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "nothing in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["one.jsonl"], "two result files, or --against"),
        (["--against", "HEAD"], "needs a measurement"),
        (["--against", "HEAD", "report"], "needs a measurement"),
        (["--against", "no-such-commit", "kernels"], "git worktree:"),
    ],
    ids=["one file", "nothing", "no measurement", "no commit"],
)
def test_what_makes_no_sense_is_one_sentence(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *words]) == 2
    assert says in capsys.readouterr().err


def test_against_measures_both_in_turn_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without building: REF's package is a folder that says where it is."""
    turns: list[str] = []

    def install(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if "pip" in command:
            Path(command[command.index("--target") + 1], "vstar_engine").mkdir(parents=True)
            return subprocess.CompletedProcess(command, 0, "", "")
        return run(command, **_)

    def measure(command: list[str], out: Path, library: Path | None) -> None:
        turns.append("REF" if library else "here")
        if library:
            assert (library / "vstar_engine" / "bench" / "harness" / "contest.py").is_file()
            head = compare.git("-C", str(library), "rev-parse", "HEAD")
            assert head == compare.git("rev-parse", "HEAD")
            assert compare.git("-C", str(library), "status", "--porcelain") == ""
        with ResultFile(out, "test") as rows:
            rows.write(ResultRow("t", {}, "ours", numbers={"median": 1.0, "p20": 1.0, "p80": 1.0}))

    run = subprocess.run
    monkeypatch.setattr(compare.subprocess, "run", install)
    monkeypatch.setattr(compare, "measure", measure)
    assert main(["compare", "--against", "HEAD", "kernels", "--frames", "16"]) == 0
    assert turns == ["REF", "here", "REF", "here"]
    assert "vstar-against" not in compare.git("worktree", "list")


@pytest.mark.slow
def test_against_builds_and_measures_another_commit(capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "compare",
                "--against",
                "HEAD",
                "--repeats",
                "1",
                "--threshold",
                "99",
                "kernels",
                "--rehearse",
                "--providers",
                "ours",
            ]
        )
        == 0
    )
    assert "layout fused" in capfd.readouterr().out
