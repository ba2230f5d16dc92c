"""`bench report`: tables and plots from rows, documents made current, and the committed ones are."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vstar_engine.bench.__main__ import main
from vstar_engine.bench.commands.main import command_line
from vstar_engine.bench.commands.report import BLOCKS, RESULTS, rendered, renewed
from vstar_engine.bench.harness import machine
from vstar_engine.bench.harness.ceilings import BANDWIDTH
from vstar_engine.bench.harness.contest import Contest, Pace, Provider, hold
from vstar_engine.bench.harness.rows import ABSENT, WRONG, ResultFile, ResultRow, read
from vstar_engine.bench.report import plots, table_cells, tables
from vstar_engine.bench.step.ladder import ENGINE
from vstar_engine.commands import main as cli

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": "a processor", "threads": 2, "torch": "2.13.0", "commit": "0123456789abcdef", "dirty": False}


def attention(provider: str, frames: int = 16, median: float = 0.01, **more: object) -> ResultRow:
    case = {
        "op": "temporal_attention",
        "level": 0,
        "frames": frames,
        "batch": 1,
        "layout": "fused",
        "shape": f"1x{frames}x40x5x64",
    }
    numbers = {
        "median": median,
        "p20": 0.9 * median,
        "p80": 1.1 * median,
        "peak_bytes": frames * 2**20,
        "share_of_bandwidth": 0.5,
        "floor": 250e-6,
    }
    numbers |= {"flops_per_second": frames * 1e9, "bytes_per_second": 1e9}
    ceilings = {"bytes_per_second": 2e9, "flops_per_second": 1e11}
    row = ResultRow("kernels", case, provider, "float32", "cpu", numbers=numbers, ceilings=ceilings, machine=MACHINE)
    return replace(row, run="1", at="2026-01-02T03:04:05Z", command="vstar-engine bench kernels", **more)


def pipeline(part: str, provider: str, median: float, **case: object) -> ResultRow:
    where = {"part": part, "model": "mini", "frames": 16, "size": "96x128", **case}
    numbers = {"median": median, "p20": median, "p80": median, "peak_bytes": 2**20}
    row = ResultRow("pipeline", where, provider, "float32", "cpu", numbers=numbers, machine=MACHINE)
    return replace(row, at="2026-01-02T03:04:05Z", command="vstar-engine bench pipeline")


def test_a_kernel_table_sets_providers_against_ours() -> None:
    rows = [
        attention("SDPA without TAR", median=0.025),
        attention("ours"),
        attention(BANDWIDTH, median=0.005),
        attention("ours", 64),
    ]
    rows[-1] = replace(rows[-1], numbers={**rows[-1].numbers, "share_of_bandwidth": 1.44})
    rows.append(attention("SDPA without TAR", 64, status=WRONG))
    title, _, command, _, head, _, *body = rendered("kernels", rows).splitlines()
    assert title == (
        "`temporal_attention`, batch 1, level 0 (40 positions, 5 heads of 64), fused layout; a processor, 2 threads, "
        "float32, torch 2.13.0, commit 012345678, 2026-01-02"
    )
    assert command == "<details><summary>Command</summary><pre><code>vstar-engine bench kernels</code></pre></details>"
    assert head == "| frames | 16 | 64 |"
    assert body == [
        "| ours | **10 ms** | **10 ms** |",
        "| SDPA without TAR | 25 ms (2.50x) | WRONG |",
        "| floor | 250 us | 250 us |",
        "| ours: of bandwidth | 50% | 144% † |",
        "| peak memory | 16 MiB | 64 MiB |",
        "",
        f"† {table_cells.REMARK}",
    ]
    assert "**10 ms [9 ms, 11 ms]**" in rendered("kernels", rows, spread=True)


def test_a_use_of_another_op_is_a_line_and_convolutions_have_their_own_table() -> None:
    def use(op: str, provider: str, median: float, form: str = "3x1x1") -> ResultRow:
        case = {"op": op, "form": form, "level": 1, "frames": 16, "batch": 1, "shape": "2x4"}
        return replace(attention(provider, median=median), case=case)

    rows = [use("linear", "ours", 0.01, "gate"), use("linear", "PyTorch's operators", 0.02, "gate"), attention("ours")]
    rows += [use("temporal_convolution", "ours", 0.01), use("temporal_convolution", "three products", 0.03)]
    said = rendered("fused", rows).splitlines()
    assert said[4] == "|  | ours | PyTorch's operators | floor | ours: of bandwidth / matrix peak | peak memory |"
    assert said[6] == "| `linear`, gate, level 1, 16 frames | **10 ms** | 20 ms (2.00x) | 250 us | 50% / - | 16 MiB |"
    assert said[12].startswith("|  | ours | three products |")
    assert said[14].startswith("| `temporal_convolution`, 3x1x1, level 1, 16 frames | **10 ms** | 30 ms (3.00x) |")
    assert "linear" not in rendered("kernels", rows)


def test_the_newest_row_of_a_machine_counts() -> None:
    old, new = attention("ours", median=1.0), replace(attention("ours", median=2.0), at="2026-02-02T00:00:00Z")
    elsewhere = replace(old, machine={**MACHINE, "cpu": "another"})
    assert {row.numbers["median"] for row in tables.newest([new, old])} == {2.0}
    assert len(tables.newest([old, new, elsewhere])) == 2


def test_an_interrupted_run_and_a_changed_checkout_are_marked() -> None:
    rows = [replace(attention("ours"), outcome="interrupted", machine={**MACHINE, "dirty": True})]
    assert "commit 012345678+, 2026-01-02. **The run was interrupted" in rendered("kernels", rows)


def test_a_ladder_reads_from_the_published_step_down() -> None:
    rungs = {"+ hoisted g": 1.0, "published": 2.0, "published, with preview": 4.0}
    body = rendered("ladder", [pipeline("ladder", name, taken) for name, taken in rungs.items()]).splitlines()[6:]
    assert body == [
        "| published, with preview | 4 s (0.50x) | 1 MiB |",
        "| published | 2 s | 1 MiB |",
        "| + hoisted g | 1 s (2.00x) | 1 MiB |",
    ]


def test_a_drift_between_contests_is_said_beside_each_of_them() -> None:
    def engine(part: str, name: str, median: float, features: frozenset[str] = ENGINE) -> ResultRow:
        row = pipeline(part, name, median)
        return replace(row, run="1", numbers={**row.numbers, "features": sorted(features)})

    rows = [engine("headline", "ours", 0.12), engine("ablation", "all", 0.15), engine("ladder", "published", 0.9, frozenset())]
    words = "The engine's step took 120 ms to 150 ms at 16 frames in the contests of this run: compare within one\n"
    assert all(words in rendered(part, rows) for part in ("headline", "ablation", "ladder"))
    near = [rows[0], engine("ablation", "all", 0.13)]
    assert "compare within one" not in rendered("headline", near) + rendered("headline", [rows[0], replace(rows[1], run="2")])


def test_a_whole_video_names_what_it_includes() -> None:
    whole = pipeline("whole", "ours", 11.0, steps=5)
    whole = replace(whole, numbers={**whole.numbers, "includes": ["UNet step", "VAE"]})
    said = rendered("stages", [pipeline("stages", "UNet step", 2.0), pipeline("stages", "VAE", 1.0), whole])
    assert "| whole video, 5 steps: UNet step, VAE | **11 s** |  |  |" in said


def test_the_published_path_stands_beside_the_engines_by_stage() -> None:
    ours, theirs = (pipeline("whole", name, taken, steps=5) for name, taken in (("ours", 11.0), ("published", 22.0)))
    ours, theirs = (replace(row, numbers={**row.numbers, "includes": ["UNet step", "mp4"]}) for row in (ours, theirs))
    step = pipeline("stages", "UNet step", 2.0)
    step = replace(step, numbers={**step.numbers, "floor": 0.5})
    parts = [step, pipeline("stages", "UNet step, published", 4.2), pipeline("stages", "mp4", 1.0)]
    assert rendered("stages", [*parts, ours, theirs]).splitlines()[4:] == [
        "| 16 frames | ours | published | floor |",
        "|---|--:|--:|--:|",
        "| text |  |  |  |",
        "| UNet step | 2 s | 4.2 s (2.10x) | 500 ms |",
        "| sampler |  |  |  |",
        "| VAE |  |  |  |",
        "| mp4 | 1 s | 1 s |  |",
        "| whole video, 5 steps: UNet step, mp4 | **11 s** | 22 s (2.00x) |  |",
    ]


def test_whole_videos_stand_in_four_rows_with_their_load() -> None:
    numbers = {"step": 0.5, "load": [0.1, 0.3], "differing": 0.0, "largest": 0}
    alike = {**numbers, "differing": 0.0012, "largest": 1}
    apart = {**numbers, "differing": 0.9, "largest": 80, "psnr": 24.04}
    named = {"published": (4.0, numbers), "clean eager": (2.0, numbers), "ours": (1.0, alike)}
    named["ours, --fast step-cache"] = (0.5, apart)
    rows = [pipeline("videos", name, taken, steps=25) for name, (taken, _) in named.items()]
    rows = [replace(row, numbers={**row.numbers, **more}) for row, (_, more) in zip(rows, named.values(), strict=True)]
    said = rendered("videos", rows).splitlines()
    assert said[0].endswith("commit 012345678, 2026-01-02, load average 0.1 to 0.3")
    assert said[6:] == [
        "| published path | 500 ms | 4 s | 1 MiB | is the reference |",
        "| clean eager | 500 ms | 2 s (2.00x as fast) | 1 MiB | yes, to the byte |",
        "| ours | 500 ms | **1 s** (4.00x as fast) | 1 MiB | yes: 0.12 % of bytes off by 1 |",
        "| ours, --fast step-cache | 500 ms | 500 ms (8.00x as fast) | 1 MiB | no: PSNR 24.0 dB |",
    ]


def test_a_wide_table_is_several_of_at_most_six_columns() -> None:
    head, line = [str(i) for i in range(12)], ["x", *"abcdef", *[""] * 5]
    tables = table_cells.markdown(head, [line, ["y", *"abcdefghijk"]]).split("\n\n")
    assert [table.splitlines()[0] for table in tables] == [
        "| 0 | 1 | 2 | 3 |",
        "| 0 | 4 | 5 | 6 | 7 |",
        "| 0 | 8 | 9 | 10 | 11 |",
    ]
    assert [len(table.splitlines()) for table in tables] == [4, 4, 3]


def test_other_tables_hold_their_numbers() -> None:
    drift = pipeline("trajectory", "ours", 0.0, steps=3, weights="trained")
    drift = replace(drift, numbers={"cosine": [1.0, 0.999, 0.99], "psnr": [80.0, 50.0, 30.0], "against": "float32"})
    assert "| 16 (trained weights) | 1.000000 | 0.999000 | 0.990000 | 80.0 | 30.0 dB |" in rendered("trajectory", [drift])
    assert "| all but dtype | 2 s (2.00x) |" in rendered(
        "ablation", [pipeline("ablation", "all", 1.0), pipeline("ablation", "all but dtype", 2.0)]
    )
    assert "| clean eager | 2 s (2.00x) |" in rendered(
        "headline", [pipeline("headline", "ours", 1.0), pipeline("headline", "clean eager", 2.0)]
    )
    held = ResultRow(
        "engine", {"part": "cold start", "model": "mini", "frames": 16}, "bytes", "float32", "cpu", machine=MACHINE
    )
    held = replace(held, numbers={"disk_bytes": 3 * 2**20}, at="2026-01-02")
    missing = replace(held, provider="AOTInductor", status=ABSENT, note="no compiler", numbers={})
    assert "| cold start: bytes | disk 3 MiB |" in rendered("engine", [held, missing])
    assert "| cold start: AOTInductor | not installed, no compiler |" in rendered("engine", [held, missing])


def test_a_document_is_made_current_between_its_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, readme = tmp_path / "rows.jsonl", tmp_path / "README.md"
    with ResultFile(results, "vstar-engine bench kernels") as rows:
        rows.write(attention("ours"))
    readme.write_text(
        "before\n<!-- bench:kernels -->\nstale\n<!-- /bench:kernels -->\nafter\n<!-- bench:engine -->\n<!-- /bench:engine -->\n"
    )
    assert main(["report", str(results), "--documents", str(readme), "--check"]) == 1
    assert "stale" in readme.read_text()
    assert main(["report", str(results), "--documents", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench:kernels -->\n\n`temporal_attention`")
    assert "stale" not in text
    assert "<!-- /bench:kernels -->\nafter\n<!-- bench:engine -->\n\nNot measured yet.\n\n<!-- /bench:engine -->" in text
    assert main(["report", str(results), "--documents", str(readme), "--check"]) == 0


def test_the_engines_command_line_leads_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "rows.jsonl"
    assert (
        cli.main(["bench", "kernels", "--rehearse", "--op", "temporal_attention", "--providers", "ours", "--out", str(results)])
        == 0
    )
    assert read([results])[0].command == "vstar-engine bench kernels --rehearse --op temporal_attention --providers ours"
    assert cli.main(["bench", "report", str(results), "--tables", "kernels"]) == 0
    assert "## kernels" in capsys.readouterr().out
    assert cli.main(["bench", "compare", str(results)]) == 2
    assert "vstar-engine: compare takes two result files" in capsys.readouterr().err


def test_a_marker_of_no_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no table 'magic' for the marker"):
        renewed("<!-- bench:magic -->\n<!-- /bench:magic -->", [])


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs" / "performance").glob("*.md"))]


def test_every_table_stands_in_a_document() -> None:
    marked = re.findall(r"<!-- bench:([\w-]+) -->", "".join(path.read_text() for path in DOCUMENTS))
    assert set(marked) == set(BLOCKS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_are_current(path: Path) -> None:
    text = path.read_text()
    assert renewed(text, tables.newest(read(sorted(RESULTS.glob("*.jsonl"))))) == text


def test_committed_rows_were_measured_on_committed_code() -> None:
    for row in read(sorted(RESULTS.glob("*.jsonl"))):
        assert row.machine["dirty"] is False, row.title
        assert re.fullmatch("[0-9a-f]{40}", row.machine["commit"])
        assert row.outcome == "complete"
        assert not re.search("/tmp|/home|/root", row.command)


def test_every_plot_is_shown_in_one_document() -> None:
    texts = [path.read_text() for path in DOCUMENTS if path.parent.name == "performance"]
    shown = [name for text in texts for name in re.findall(r"\]\(plots/([^)]+)\)", text)]
    assert sorted(shown) == sorted(path.name for path in (ROOT / "docs/performance/plots").iterdir())


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_plots_are_drawn_and_the_same_rows_draw_the_same(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    rows = [attention(name, frames, frames / 1e3) for name in ("ours", "SDPA without TAR") for frames in (16, 64)]
    rows += [pipeline("ladder", name, taken) for name, taken in (("published", 2.0), ("+ hoisted g", 1.0), ("+ no waste", 1.5))]
    one = attention("ours")
    rows.append(replace(one, case={**one.case, "batch": 2}))  # a single length
    first, second = (plots.draw(rows, tmp_path / name, ending) for name in "ab")
    slug = "level0-fused-b1-float32-a-processor-2-threads"
    names = [f"roofline-{slug}", f"time-{slug}", f"memory-{slug}", "ladder-mini-16f-float32-a-processor-2-threads"]
    assert [path.name for path in first] == [f"{name}.{ending}" for name in names]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert all(path.stat().st_size > 5000 for path in first)
    assert plots.links(rows, kind="time")[0].endswith(f"(plots/time-{slug}.svg)")


def test_plots_of_two_gpus_are_two_files() -> None:
    rows = [
        replace(row, device="cuda:0", machine={**MACHINE, "gpu": f"NVIDIA {gpu}"})
        for gpu in ("H100", "H200")
        for row in (attention("ours", 16), attention("ours", 64), pipeline("ladder", "published", 2.0))
    ]
    names = [plot.name for plot in plots.planned(rows)]
    assert len(set(names)) == len(names) == 8
    assert "ladder-mini-16f-float32-nvidia-h200" in names


def test_growth_sets_every_provider_against_the_frames() -> None:
    rows = [attention("ours", frames, frames / 1e3) for frames in (16, 64)] + [attention("SDPA without TAR", 64, 0.3)]
    rows += [pipeline("headline", "clean eager", 1.0), pipeline("headline", "clean eager", 5.0, frames=64)]
    attended, step = (part.splitlines() for part in rendered("growth", rows).split("\n\n")[2::3])
    assert attended[0] == "| frames | 16 | 64 | time grows | memory grows |"
    assert attended[2:] == [
        "| ours | 16 ms, 16 MiB | 64 ms, 64 MiB | 4x | 4x |",
        "| SDPA without TAR |  | 300 ms, 64 MiB |  |  |",
    ]
    assert step[2:] == ["| clean eager | 1 s, 1 MiB | 5 s, 1 MiB | 5x | 1x |"]
    assert rendered("growth", rows[:1]) == ""


def test_committed_plots_are_those_of_the_committed_rows(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    if f"matplotlib=={matplotlib.__version__}\n" not in (ROOT / "constraints.txt").read_text():
        pytest.skip(f"matplotlib {matplotlib.__version__} draws other bytes than the pinned one")
    drawn = plots.draw(tables.newest(read(sorted(RESULTS.glob("*.jsonl")))), tmp_path, "svg")
    committed = {path.name: path.read_bytes() for path in (ROOT / "docs/performance/plots").iterdir()}
    assert {path.name: path.read_bytes() for path in drawn} == committed


def test_plots_without_matplotlib_are_one_sentence(tmp_path: Path, modules: Callable, capsys: pytest.CaptureFixture) -> None:
    results = tmp_path / "rows.jsonl"
    with ResultFile(results, "vstar-engine bench kernels") as rows:
        rows.write(attention("ours"))
    modules({"matplotlib": None})
    assert main(["report", str(results), "--plots", str(tmp_path)]) == 7
    assert "plots need matplotlib" in capsys.readouterr().err


def test_an_old_file_is_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old.jsonl"
    old.write_text('{"name": "temporal_attention/16f/ours", "machine": {"commit": "b309e8a688f4"}}\n')
    assert main(["report", str(old)]) == 2
    assert "was written with schema 1 and this is schema 2: measure again" in capsys.readouterr().err


def test_a_command_names_no_place_of_this_machine() -> None:
    words = ["pipeline", "--out", "/tmp/rows.jsonl", "--profile", "/tmp/found/here", "--weights=/models/vc2/", "--frames", "16"]
    assert command_line(words) == "vstar-engine bench pipeline --profile here --weights=vc2/ --frames 16"
    assert command_line(["kernels", "--out=rows.jsonl", "--providers", "ours, g = 0"]) == (
        "vstar-engine bench kernels --providers 'ours, g = 0'"
    )


@pytest.mark.parametrize(("given", "dirty"), [("0123456789" * 4, False), ("0123456789" * 4 + "+", True)])
def test_a_copy_without_git_names_its_commit(given: str, dirty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSTAR_COMMIT", given)
    assert machine.commit() == {"commit": "0123456789" * 4, "dirty": dirty, "commit_from": "VSTAR_COMMIT"}
    monkeypatch.setenv("VSTAR_COMMIT", "main")
    with pytest.raises(ValueError, match=r"VSTAR_COMMIT takes 40 hexadecimal digits.*got 'main'"):
        machine.commit()
    monkeypatch.delenv("VSTAR_COMMIT")
    monkeypatch.setattr(machine, "_said_by", lambda *words: None)
    assert machine.commit() == {"commit": None, "dirty": None, "commit_from": None}


def stopped() -> Callable[[], Tensor]:
    raise SystemExit(143)


def test_a_contest_that_is_cut_off_keeps_who_was_right(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    def contest(*prepared: Callable[[], Callable[[], Tensor]]) -> Contest:
        providers = [Provider(name, prepare) for name, prepare in zip("ab", prepared, strict=True)]
        return Contest("t", {}, torch.float32, torch.device("cpu"), providers, lambda _, answer: float(answer - 1), 1e-6)

    def right() -> Callable[[], Tensor]:
        return lambda: torch.ones(())

    with pytest.raises(SystemExit), ResultFile(path, "test") as rows:
        hold(contest(right, stopped), rows, Pace(rounds=3))
    first, second = read([path])
    assert (first.provider, first.status, first.outcome, first.numbers["alone"]) == ("a", "ok", "interrupted", True)
    assert first.numbers["median"] > 0
    assert (second.status, second.note) == ("skipped", "stopped after 0 s of preparing it")
    with ResultFile(path, "test") as rows:
        hold(contest(right, right), rows, Pace(rounds=3))
    whole = [row for row in read([path]) if row.outcome == "complete"]
    assert [(row.provider, row.numbers["rounds"]) for row in whole] == [("a", 3), ("b", 3)]
    assert not any(row.numbers.get("alone") for row in whole)
