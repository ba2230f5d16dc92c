"""bench/on_gpu.sh: rehearsed on the CPU, without the libraries that a GPU machine may lack."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vstar_engine.bench.commands import main
from vstar_engine.bench.harness.rows import ABSENT, OK, SKIPPED, ResultRow, read

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "bench/on_gpu.sh")
COMMIT = "0123456789" * 4
# one part of each command; the others take as long again and are rehearsed by tests of `bench pipeline` and `bench roofline`
QUICK = ["machine", "kernels", "step", "tests"]
# the others differ from these by flags that a rehearsal overrides
REHEARSED = ["machine", "kernels", "step", "tests", "aoti", "trajectory", "fast", "compiled", "blocks", "ladder"]
OTHERS = ["long", "autotune", "fused", "shapes"]
# a GPU machine may lack these, so nothing that it runs may import them
ABSENT_LIBRARIES = ("tokenizers", "ftfy", "av", "psutil", "tqdm", "PIL", "matplotlib", "httpx")


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", SCRIPT, *arguments], env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture
def rehearsal(tmp_path: Path) -> Callable[[list[str]], list[ResultRow]]:
    """A call that rehearses parts and returns their rows."""

    def rehearse(names: list[str]) -> list[ResultRow]:
        (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT_LIBRARIES}))\n")
        out = tmp_path / "out"
        environment = {"PYTHONPATH": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "VSTAR_COMMIT": COMMIT}
        done = call(str(out), "--rehearse", "--minutes", "120", "--parts", *names, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        files = {file.name for file in out.iterdir()}
        assert files == {"summary.txt", "log.txt", "rows.jsonl", "profile.md", "trace.json.gz"}
        assert all(file.stat().st_size < 16 * 2**20 for file in out.iterdir())
        summary = (out / "summary.txt").read_text()
        assert summary.startswith(f"commit {COMMIT}\n")
        for name in names:
            assert f"{name}: exit code 0" in summary
        rows = read([out / "rows.jsonl"])
        assert {row.outcome for row in rows} == {"complete"}
        assert {(row.machine["commit"], row.machine["dirty"], row.machine["commit_from"]) for row in rows} == {
            (COMMIT, False, "VSTAR_COMMIT")
        }
        assert not any("/" in row.command for row in rows)
        assert {row.status for row in rows} == {OK, ABSENT, SKIPPED}
        return rows

    return rehearse


def parts_of(rows: list[ResultRow]) -> set[str]:
    return {row.case.get("part", row.case.get("op")) for row in rows}


def test_rehearsal(rehearsal: Callable[[list[str]], list[ResultRow]]) -> None:
    found = parts_of(rehearsal(QUICK))
    assert {"temporal_attention", "headline", "stages", "whole", "profile"} <= found
    assert {"groupnorm_silu", "geglu", "temporal_convolution"} <= found


@pytest.mark.slow
def test_rehearsal_of_all_parts(rehearsal: Callable[[list[str]], list[ResultRow]]) -> None:
    rows = rehearsal(REHEARSED)
    found = parts_of(rows)
    assert {"temporal_attention", "headline", "stages", "whole", "profile", "ladder", "trajectory", "kind", "block"} <= found
    assert {"groupnorm_silu", "geglu", "temporal_convolution", "fast"} <= found
    packaged = [row for row in rows if row.provider == "ours, AOTInductor" and row.status == OK]
    assert packaged[0].numbers["backend"] == "none: the traced graph itself"


@pytest.fixture
def stub(tmp_path: Path) -> str:
    """An interpreter whose tests fail and whose measurements do nothing."""
    path = tmp_path / "python"
    path.write_text('#!/usr/bin/env bash\nprintf "%q " "$@"; echo\ncase "$*" in "-m pytest"*) exit 3;; esac\n')
    path.chmod(0o755)
    return str(path)


def test_a_failed_part_is_reported_after_all_have_run(tmp_path: Path, stub: str) -> None:
    done = call(str(tmp_path / "out"), PYTHON=stub)
    assert done.returncode == 1
    summary = (tmp_path / "out/summary.txt").read_text()
    assert "tests: exit code 3" in summary
    assert "fast: exit code 0" in summary
    log = (tmp_path / "out/log.txt").read_text()
    assert "-m vstar_engine.bench pipeline --full --rounds 3 --frames 64 --parts headline stages --no-compile" in log
    assert "--rehearse" not in log
    assert "autotune" not in log


def test_every_part_is_a_command_that_is_understood(tmp_path: Path, stub: str) -> None:
    done = call(str(tmp_path / "out"), "--parts", *REHEARSED, *OTHERS, PYTHON=stub)
    assert set(re.findall(r"\[(\w+)\]=\d", Path(SCRIPT).read_text())) == {*REHEARSED, *OTHERS}
    parser = argparse.ArgumentParser()
    main.add_options(parser)
    asked = [line.split("vstar_engine.bench ")[1] for line in done.stdout.splitlines() if "vstar_engine.bench" in line]
    assert len(asked) == len([*REHEARSED, *OTHERS]) - 2
    for words in asked:
        parser.parse_args(shlex.split(words))


def test_what_a_part_leaves_is_shared_by_those_to_come(tmp_path: Path, stub: str) -> None:
    """The stub takes no time, so each part gets its share of all minutes by the weight of those to come."""
    call(str(tmp_path / "out"), "--minutes", "60", "--parts", "compiled", "autotune", PYTHON=stub)
    summary = (tmp_path / "out/summary.txt").read_text()
    seconds = [int(line.split(" of ")[1].removesuffix(" s")) for line in summary.splitlines()[1:]]
    assert seconds[0] == pytest.approx(3600 * 110 / 540, abs=5)
    assert seconds[1] == pytest.approx(3600, abs=5)
    log = (tmp_path / "out/log.txt").read_text()
    assert "--compile-mode max-autotune-gemm --out" in log
    assert re.search(r"--compile-mode max-autotune-gemm .* --budget 2[67]\d\d \n", log)


def test_named_parts_add_to_what_is_there_and_a_full_run_starts_anew(tmp_path: Path, stub: str) -> None:
    out = tmp_path / "out"
    for parts in (["--parts", "long"], ["--parts", "ladder"]):
        call(str(out), *parts, PYTHON=stub)
    assert [line for line in (out / "log.txt").read_text().splitlines() if line.startswith("==")][1].startswith("== ladder")
    call(str(out), PYTHON=stub)
    assert "ladder" not in (out / "log.txt").read_text()


def test_of_too_many_rows_the_first_stay(tmp_path: Path) -> None:
    """Every call of this interpreter writes 9 MB of rows, the part's number in them."""
    writer = tmp_path / "python"
    writer.write_text(
        '#!/bin/sh\nwhile [ "$1" != --out ]; do shift; done\n'
        'echo x >>"$2.count"; n=$(wc -l <"$2.count")\nyes "row of call $n" | head -c 9000000 >>"$2"\n'
    )
    writer.chmod(0o755)
    out = tmp_path / "out"
    call(str(out), "--parts", "kernels", "long", "ladder", PYTHON=str(writer))
    rows = (out / "rows.jsonl").read_text().splitlines()
    assert (out / "rows.jsonl").stat().st_size < 16 * 2**20
    assert rows[0] == "row of call 1"
    assert len([row for row in rows if row == "row of call 1"]) > 500_000
    assert "row of call 3" not in rows


NONSENSE = [
    [],
    ["--rehearse"],
    ["out", "--minutes"],
    ["out", "--minutes", "0"],
    ["out", "--fast"],
    ["out", "--parts"],
    ["out", "--parts", "magic"],
]


@pytest.mark.parametrize("arguments", NONSENSE)
def test_what_it_does_not_understand_is_refused(arguments: list[str]) -> None:
    done = call(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: bench/on_gpu.sh OUT [--minutes N] [--rehearse] [--parts NAME...], got:")
