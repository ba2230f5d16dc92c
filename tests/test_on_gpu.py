"""bench/on_gpu.sh: rehearsed on the CPU, without the libraries that a GPU machine may lack."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vstar_engine.bench.rows import ABSENT, OK, SKIPPED, read

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "bench/on_gpu.sh")
# a GPU machine may lack these, so nothing that it runs may import them
ABSENT_LIBRARIES = ("tokenizers", "ftfy", "av", "psutil", "tqdm", "PIL", "matplotlib", "httpx")


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", SCRIPT, *arguments], env={**os.environ, **environment}, capture_output=True, text=True)


def test_rehearsal(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT_LIBRARIES}))\n")
    out = tmp_path / "out"
    done = call(str(out), "--rehearse", "--minutes", "27", PYTHONPATH=str(tmp_path), PYTHON=sys.executable, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    files = {file.name for file in out.iterdir()}
    assert files == {"summary.txt", "log.txt", "rows.jsonl", "profile.md", "trace.json.gz"}
    assert all(file.stat().st_size < 16 * 2**20 for file in out.iterdir())
    summary = (out / "summary.txt").read_text()
    for part in ("machine", "gpu_tests", "kernels", "step", "blocks", "compiled", "fused", "shapes", "ladder", "fast"):
        assert f"{part}: exit code 0" in summary
    rows = read([out / "rows.jsonl"])
    assert {row.outcome for row in rows} == {"complete"}
    assert {row.status for row in rows} == {OK, ABSENT, SKIPPED}
    parts = {row.case.get("part", row.case.get("op")) for row in rows}
    assert {"temporal_attention", "headline", "stages", "whole", "profile", "ladder", "trajectory", "kind", "block"} <= parts
    assert {"groupnorm_silu", "geglu", "temporal_convolution", "fast"} <= parts
    packaged = [row for row in rows if row.provider == "ours, AOTInductor" and row.status == OK]
    assert packaged[0].numbers["export"] > 0


@pytest.fixture
def stub(tmp_path: Path) -> str:
    """An interpreter whose tests fail and whose measurements do nothing."""
    path = tmp_path / "python"
    path.write_text('#!/bin/sh\necho "$@"\ncase "$*" in "-m pytest"*) exit 3;; esac\n')
    path.chmod(0o755)
    return str(path)


def test_a_failed_part_is_reported_after_all_have_run(tmp_path: Path, stub: str) -> None:
    done = call(str(tmp_path / "out"), PYTHON=stub)
    assert done.returncode == 1
    summary = (tmp_path / "out/summary.txt").read_text()
    assert "gpu_tests: exit code 3" in summary
    assert "ladder: exit code 0" in summary
    log = (tmp_path / "out/log.txt").read_text()
    assert "-m vstar_engine.bench pipeline --full --frames 64 --parts headline stages --no-compile" in log
    assert "--rehearse" not in log
    assert "--compile-mode default" in log


def test_minutes_scale_the_parts(tmp_path: Path, stub: str) -> None:
    call(str(tmp_path / "out"), "--minutes", "36", PYTHON=stub)
    log = (tmp_path / "out/log.txt").read_text()
    assert "--compile-mode max-autotune-no-cudagraphs" in log
    assert "kernels --frames 64 16 --limit 10 --out" in log
    assert "--budget 180\n" in log


@pytest.mark.parametrize("arguments", [[], ["--rehearse"], ["out", "--minutes"], ["out", "--minutes", "0"], ["out", "--fast"]])
def test_what_it_does_not_understand_is_refused(arguments: list[str]) -> None:
    done = call(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: bench/on_gpu.sh OUT [--minutes N] [--rehearse], got:")
