"""`bench engine`: cold starts in processes of their own, and what building takes."""

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

from vstar_engine.bench.__main__ import main
from vstar_engine.bench.commands.report import rendered
from vstar_engine.bench.harness.contest import Contest, Provider
from vstar_engine.bench.harness.rows import read


@pytest.mark.slow
def test_a_cold_start_is_measured_in_its_own_process(tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    assert main(["engine", "--rehearse", "--out", str(results)]) == 0
    table = {row.provider: row.numbers for row in read([results])}
    spans = [table[name]["median"] for name in ("import", "load", "first step", "second step")]
    assert all(taken > 0 for taken in spans)
    assert sum(spans) < table["process"]["median"]
    assert table["bytes"]["disk_bytes"] > 2**20
    assert table["bytes"]["host_bytes"] > table["bytes"]["disk_bytes"]


class Starts:
    """Stands for the process of a cold start, of 2 seconds by a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.count = 0.0, 0
        monkeypatch.setattr("vstar_engine.bench.commands.engine.cold_start", self)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def __call__(self, args: object) -> dict[str, float]:
        self.now, self.count = self.now + 2, self.count + 1
        return dict.fromkeys(("process", "import", "load", "first_step", "second_step", "host_bytes", "device_bytes"), 1.0)


@pytest.mark.parametrize(
    ("flags", "starts"),
    [([], 4), (["--rounds", "9", "--limit", "9"], 4), (["--budget", "5"], 2), (["--budget", "1"], 2), (["--budget", "0"], 0)],
)
def test_cold_starts_heed_limit_and_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], starts: int
) -> None:
    made, results = Starts(monkeypatch), tmp_path / "rows.jsonl"
    assert main(["engine", *flags, "--out", str(results)]) == 0
    assert made.count == starts
    rows = read([results])
    assert [row.status for row in rows] == (["ok"] * 6 if starts else ["skipped"])
    assert all(row.numbers["rounds"] == starts - 1 for row in rows[:-1])


def test_builds_are_rows_and_who_lacks_a_library_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "rows.jsonl"
    manifest = {"folder": "here", "seconds": 39.5, "peak_memory": 2**30, "files": [{"bytes": 2**20}, {"bytes": 2**21}]}

    def run(command: list[str], **how: object) -> subprocess.CompletedProcess[str]:
        if command[0] == "git":
            return subprocess.CompletedProcess(command, 1, "", "")
        assert len({how["env"][name] for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}) == 1
        if "onnxruntime" in command:
            return subprocess.CompletedProcess(command, 7, "", "vstar-engine: needs the onnx package\n")
        return subprocess.CompletedProcess(command, 0, "a line\n" + json.dumps(manifest), "")

    def contest(folders: list[Path], frames: int) -> Contest:
        assert [*map(str, folders)] == ["here"]
        case = {"part": "step", "model": "mini", "frames": frames, "size": "96x128"}
        providers = [Provider("eager", lambda: lambda: torch.ones(()), traced=False)]
        return Contest("engine", case, torch.float32, torch.device("cpu"), providers, lambda _, answer: 0.0, 1e-6)

    monkeypatch.setattr("vstar_engine.bench.commands.engine.subprocess.run", run)
    monkeypatch.setattr("vstar_engine.bench.commands.engine.compiled_step.contest", contest)
    flags = ["--no-starts", "--builds", "onnxruntime", "inductor", "--out", str(results)]
    assert main(["engine", *flags]) == 0
    lacking, build, step = read([results])
    assert (lacking.provider, lacking.status, lacking.note) == (
        "onnxruntime",
        "not installed",
        "vstar-engine: needs the onnx package",
    )
    assert build.numbers["median"] == 39.5
    said = rendered("engine", [build, step])
    assert "| build: inductor | 39.5 s, disk 3 MiB, host 1024 MiB |" in said
    assert "| step: eager | " in said


def test_a_cold_start_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "rows.jsonl"
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nCheckpointError: damaged\n")
    monkeypatch.setattr("vstar_engine.bench.commands.engine.subprocess.run", lambda *_, **__: failed)
    assert main(["engine", "--out", str(results)]) == 1
    assert [(row.status, row.note) for row in read([results])] == [("failed", "RuntimeError: CheckpointError: damaged")]
