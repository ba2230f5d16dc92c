"""The benchmark harness: its timer, its rows, and the rehearsal of what a GPU machine runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vstar_engine.bench import forward
from vstar_engine.bench.__main__ import main
from vstar_engine.bench.blocks import count_flops
from vstar_engine.bench.forward import REHEARSAL, ForwardBench, Variant
from vstar_engine.bench.rows import Rows, sentence
from vstar_engine.bench.seeded import LAYOUTS, seeded_unet, step_inputs
from vstar_engine.bench.timing import interleave, machine, summarise
from vstar_engine.config import MODELS

ROOT = Path(__file__).parent.parent
# a GPU machine may lack these, so nothing that it runs may import them
ABSENT = ("tokenizers", "ftfy", "av", "psutil", "tqdm", "PIL")

COMPILED = "unet/2f/channels_last/compile"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("rounds", "warmup"), [(3, 2), (1, 0)])
def test_interleave_takes_the_variants_in_turn(rounds: int, warmup: int) -> None:
    calls: list[str] = []
    variants = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = interleave(variants, rounds=rounds, warmup=warmup)
    assert "".join(calls) == "abc" * (rounds + warmup)
    assert list(timings) == list("abc")
    assert all(t.rounds == rounds and 0 <= t.p20 <= t.median <= t.p80 for t in timings.values())


def test_interleave_on_a_gpu_reads_events_after_they_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            log.append("read")
            return 1500.0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("idle"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert interleave({"a": lambda: log.append("call")}, rounds=1, warmup=0)["a"].median == 1.5
    assert log == ["idle", "record", "call", "record", "wait", "read"]


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 1), (1, -1)])
def test_interleave_refuses_nothing_to_time(rounds: int, warmup: int) -> None:
    with pytest.raises(ValueError, match=f"got {rounds} and {warmup}"):
        interleave({"a": int}, rounds, warmup)


def test_summary_is_the_median_and_the_outer_fifths() -> None:
    timing = summarise([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (timing.median, timing.p20, timing.p80, timing.rounds) == (3.5, 2.0, 5.0, 6)


def test_machine_names_what_numbers_belong_to() -> None:
    here = machine()
    assert here["torch"] == torch.__version__
    assert here["threads"] == torch.get_num_threads()
    assert {"gpu", "cpu", "python", "triton", "commit", "dirty"} <= here.keys()
    assert json.loads(json.dumps(here)) == here


@pytest.mark.parametrize(("frames", "tflop"), [(16, 12.58), (64, 50.54)])
def test_flops_of_the_full_network(frames: int, tflop: float) -> None:
    spec = MODELS["videocrafter2"]
    both_branches = step_inputs(spec, spec.size, frames, "cpu", torch.float16)
    counted = count_flops(spec.unet, both_branches)
    assert counted["whole"] / 2e12 == pytest.approx(tflop, rel=5e-4)
    assert sum(counted.values()) == pytest.approx(2 * counted["whole"])
    assert all(part > 0 for part in counted.values())


def test_a_seed_gives_the_same_weights_and_a_finite_forward() -> None:
    spec = MODELS["mini"]
    first, second, other = (seeded_unet(spec.unet, "cpu", torch.float32, seed) for seed in (0, 0, 1))
    weights = [unet.middle_block[0].in_layers[2].weight for unet in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    out = first(*step_inputs(spec, (32, 32), 2, "cpu", torch.float32))
    assert out.isfinite().all()
    assert 0.1 < out.std() < 10


def test_a_failing_and_a_wrong_variant_become_rows_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ForwardBench.forward

    def spoiled(bench: ForwardBench, variant: Variant) -> object:
        call = real(bench, variant)
        if variant.mode == "compile":
            raise RuntimeError("the compiler gave up\nat length")
        return call if variant.layout == LAYOUTS[0] else lambda: 1.001 * call()

    monkeypatch.setattr(ForwardBench, "forward", spoiled)
    path = tmp_path / "rows.jsonl"
    with torch.no_grad():
        bench = ForwardBench(REHEARSAL, Rows(path))
        bench.reference(2)
        bench.contest([Variant(2, LAYOUTS[0], "eager"), Variant(2, LAYOUTS[1], "eager"), Variant(2, LAYOUTS[0], "compile")])
    rows = {row["name"]: row for row in read(path)}
    assert rows["unet/2f/channels_last/eager"]["numbers"]["median"] > 0
    wrong, failed = rows["unet/2f/contiguous/eager"], rows["unet/2f/channels_last/compile"]
    assert wrong["error"].startswith("WrongResult: WRONG, relative L2 error 0.001")
    assert failed["error"] == "RuntimeError: the compiler gave up"
    assert wrong["numbers"] == failed["numbers"] == {}
    assert bench.rows.failures == [wrong["name"], failed["name"]]


def test_a_spent_budget_names_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    assert main(["unet", "--rehearse", "--budget", "0", "--out", str(path)]) == 0
    skipped = {row["name"] for row in read(path) if row["error"]}
    plain = {*(f"unet/2f/{layout}/eager" for layout in LAYOUTS), f"unet/2f/{LAYOUTS[0]}/reference"}
    assert skipped == {"reference/2f", "profile/2f", *plain, COMPILED}
    assert f"{COMPILED}: skipped: 0 s of the budget's 0 are left" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unet"]) == 6
    assert capsys.readouterr().out == "error: device cuda is not here: PyTorch finds no GPU; use --device cpu\n"


def test_a_row_names_the_first_line_of_an_error() -> None:
    assert sentence(ValueError("\n  too long\nmore")) == "ValueError: too long"
    assert sentence(RuntimeError()) == "RuntimeError: no message"


def test_on_gpu_rehearsal(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", str(ROOT / "bench/on_gpu.sh"), str(out), "--rehearse"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = list(out.iterdir())
    assert len(files) <= 8
    assert all(file.is_file() and file.stat().st_size < 16 * 2**20 for file in files)
    assert "gpu_tests: exit code 0" in (out / "summary.txt").read_text()

    rows = read(out / "unet.jsonl")
    eager = [f"unet/2f/{layout}/eager" for layout in LAYOUTS]
    plain = [*eager, f"unet/2f/{LAYOUTS[0]}/reference"]
    assert [row["name"] for row in rows] == ["ceiling/matmul", *plain, "profile/2f", eager[0], COMPILED]
    for row in rows:
        assert row.keys() == {"name", "params", "numbers", "error", "machine"}
        assert row["error"] is None
        assert row["machine"]["torch"] == torch.__version__
    for row in rows[1:4] + rows[5:]:
        numbers = row["numbers"]
        assert 0 < numbers["p20"] <= numbers["median"] <= numbers["p80"]
        assert numbers["tflops"] > 0
        assert numbers["error"] <= forward.ERROR_BUDGET[torch.float32]
    shares = dict(rows[4]["numbers"]["share"])
    assert shares.pop("whole") == 1
    assert sum(shares.values()) == pytest.approx(1, abs=0.1)
    assert {row["error"] for row in read(out / "kernels.jsonl")} == {None}


def test_on_gpu_reports_a_failed_part_after_running_all(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$@"\ncase "$*" in "-m pytest"*) exit 3;; esac\n')
    stub.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "bench/on_gpu.sh"), str(tmp_path / "out")],
        env={**os.environ, "PYTHON": str(stub)},
        capture_output=True,
    )
    assert done.returncode == 1
    summary = (tmp_path / "out/summary.txt").read_text()
    assert "gpu_tests: exit code 3" in summary
    assert "unet: exit code 0" in summary
    assert "--rehearse" not in (tmp_path / "out/unet.log").read_text()


def test_the_published_transformer_agrees_with_ours(tmp_path: Path) -> None:
    assert main(["transformer", "--rehearse", "--out", str(tmp_path / "rows.jsonl")]) == 0
    ours, published = read(tmp_path / "rows.jsonl")
    assert ours["error"] is published["error"] is None
    assert ours["numbers"]["error"] <= 1e-5
