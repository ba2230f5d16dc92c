"""The benchmark harness: its timer, its rows, and how a contest treats the wrong, the missing and the failing."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from support import fake_graphs
from vstar_engine.bench.harness import ceilings, timing
from vstar_engine.bench.harness import contest as contests
from vstar_engine.bench.harness.block_costs import flop_counter
from vstar_engine.bench.harness.ceilings import BANDWIDTH, MATRIX, Ceiling
from vstar_engine.bench.harness.contest import Contest, Pace, Provider, hold
from vstar_engine.bench.harness.machine import cache_bytes, machine
from vstar_engine.bench.harness.rows import (
    ABSENT,
    FAILED,
    INTERRUPTED,
    OK,
    SKIPPED,
    WRONG,
    ResultFile,
    ResultRow,
    read,
    seconds,
    sentence,
    share,
)
from vstar_engine.bench.harness.timing import MIN_ROUNDS, interleave, seconds_of_second, seconds_of_short, summarise
from vstar_engine.bench.step.ladder import recorded
from vstar_engine.errors import MissingLibrary

EXACT = torch.ones(4)
COMMAND = "vstar-engine bench test"


def right() -> Tensor:
    return EXACT.clone()


def contest(*providers: Provider, **more: object) -> Contest:
    def error(name: str, answer: Tensor) -> float:
        return float((answer - EXACT).norm() / EXACT.norm())

    return Contest("test", {"frames": 4}, torch.float32, torch.device("cpu"), providers, error, 1e-3, **more)


def held(path: Path, *providers: Provider, pace: Pace = Pace(rounds=1, warmup=0), **more: object) -> dict[str, ResultRow]:  # noqa: B008
    with ResultFile(path, COMMAND) as rows:
        hold(contest(*providers, **more), rows, pace)
    return {row.provider: row for row in read([path])}


@pytest.mark.parametrize(("rounds", "warmup"), [(3, 2), (1, 0)])
def test_interleave_takes_the_variants_in_turn(rounds: int, warmup: int) -> None:
    calls: list[str] = []
    variants = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = interleave(variants, rounds=rounds, warmup=warmup)
    assert "".join(calls) == "abc" * (rounds + warmup)
    assert list(timings) == list("abc")
    assert all(t.rounds == rounds and 0 <= t.p20 <= t.median <= t.p80 for t in timings.values())


def test_interleave_ends_where_the_next_round_would_pass_its_limit() -> None:
    assert interleave({"a": int}, rounds=99, warmup=0, limit=0.0)["a"].rounds == MIN_ROUNDS


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

    timing.host_clock()  # loaded later, it would be the clock of a GPU that it found
    there = {"is_available": lambda: True, "synchronize": lambda: log.append("idle"), "Event": Event}
    for name, stand_in in there.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert interleave({"a": lambda: log.append("call")}, rounds=1, warmup=0)["a"].median == 1.5
    assert log == ["idle", "idle", "record", "call", "record", "wait", "read"]


def test_a_short_call_goes_to_tritons_timer_on_a_gpu(monkeypatch: pytest.MonkeyPatch, modules: Callable) -> None:
    pytest.importorskip("triton.testing")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def do_bench(call: Callable[[], object], warmup: int, rep: int, return_mode: str) -> list[float]:
        assert return_mode == "all"
        call()
        return [2.0, 4.0]

    modules({"triton.testing": SimpleNamespace(do_bench=do_bench)})
    assert seconds_of_short(int) == [0.002, 0.004]


@pytest.mark.parametrize(("seconds", "times"), [(0.01, 2), (0.06, 1)])
def test_a_short_call_on_a_cpu_follows_one_of_its_kind(seconds: float, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    now = iter(range(99))
    monkeypatch.setattr(timing, "mark", lambda: seconds * next(now))
    assert seconds_of_short(lambda: calls.append(1)) == [pytest.approx(seconds)]
    assert len(calls) == times


def test_a_path_that_changes_memory_follows_one_of_its_kind() -> None:
    calls: list[int] = []
    assert len(seconds_of_second(lambda: calls.append(1))) == 1
    assert len(calls) == 2


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 1), (1, -1)])
def test_interleave_refuses_nothing_to_time(rounds: int, warmup: int) -> None:
    with pytest.raises(ValueError, match=f"got {rounds} and {warmup}"):
        interleave({"a": int}, rounds, warmup)


def test_summary_is_the_median_and_the_outer_fifths() -> None:
    timing = summarise([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (timing.median, timing.p20, timing.p80, timing.rounds, timing.least) == (3.5, 2.0, 5.0, 6, 1.0)


def test_machine_names_what_numbers_belong_to() -> None:
    here = machine()
    assert here["torch"] == torch.__version__
    assert here["threads"] == torch.get_num_threads()
    assert {"gpu", "driver", "cpu", "python", "triton", "numpy", "commit", "dirty", "load"} <= here.keys()
    assert json.loads(json.dumps(here)) == here


def test_a_wrong_answer_is_refused_and_never_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []

    def spoiled() -> Tensor:
        calls.append("wrong")
        return 1.01 * right()

    found = held(
        tmp_path / "rows.jsonl", Provider("ours", lambda: right), Provider("spoiled", lambda: spoiled), pace=Pace(5, 2)
    )
    assert found["ours"].status == OK
    assert found["ours"].numbers["median"] > 0
    assert found["spoiled"].status == WRONG
    assert found["spoiled"].numbers == {}
    assert found["spoiled"].note == "relative L2 error 0.01, wanted at most 0.001"
    assert calls == ["wrong"]
    assert "test: frames 4: spoiled: WRONG, relative L2 error 0.01" in capsys.readouterr().out


@pytest.mark.parametrize("answer", [torch.full((4,), torch.nan), torch.tensor([1.0, 1.0, 1.0, torch.inf])], ids=["nan", "inf"])
def test_what_is_not_a_number_is_wrong(tmp_path: Path, answer: Tensor) -> None:
    assert held(tmp_path / "rows.jsonl", Provider("ours", lambda: lambda: answer))["ours"].status == WRONG


def test_missing_and_failing_providers_become_rows_and_the_others_run(tmp_path: Path) -> None:
    def missing() -> Callable[[], Tensor]:
        raise MissingLibrary("xformers is not installed")

    def failing() -> Callable[[], Tensor]:
        raise RuntimeError("the compiler gave up\nat length")

    providers = [Provider("missing", missing), Provider("failing", failing), Provider("ours", lambda: right)]
    found = held(tmp_path / "rows.jsonl", *providers)
    assert (found["missing"].status, found["missing"].note) == (ABSENT, "xformers is not installed")
    assert (found["failing"].status, found["failing"].note) == (FAILED, "RuntimeError: the compiler gave up")
    assert found["ours"].status == OK


def test_only_wrong_and_failed_rows_are_failures(tmp_path: Path) -> None:
    rows = ResultFile(tmp_path / "rows.jsonl", COMMAND)
    for status in (OK, ABSENT, SKIPPED, WRONG, FAILED):
        rows.write(ResultRow("test", {}, status, status=status))
    assert rows.failures == ["test: : WRONG", "test: : failed"]


def test_a_programming_error_is_not_a_row(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        held(tmp_path / "rows.jsonl", Provider("ours", lambda: lambda: {}["a"]))


def test_what_would_not_fit_or_start_in_time_is_skipped(tmp_path: Path, free_memory: Callable) -> None:
    free_memory(2**30)
    found = held(tmp_path / "rows.jsonl", Provider("large", lambda: right, needs=0.9 * 2**30), Provider("ours", lambda: right))
    assert found["large"].status == SKIPPED
    assert found["large"].note == "needs about 0.9 GiB of 1.0 that are free"
    late = held(tmp_path / "late.jsonl", Provider("ours", lambda: right), pace=Pace.within(-1.0))
    assert (late["ours"].status, late["ours"].note) == (SKIPPED, "0 s were left")


def test_shares_are_of_ceilings_measured_in_the_same_contest(tmp_path: Path) -> None:
    ceilings = {
        BANDWIDTH: Ceiling({"a read": (right, 100.0), "a copy": (right, 1e-9)}),
        MATRIX: Ceiling({"a product": (right, 1000.0)}),
    }
    found = held(tmp_path / "rows.jsonl", Provider("ours", lambda: right), bytes=50.0, flops=50.0, ceilings=ceilings)
    numbers, most = found["ours"].numbers, found["ours"].ceilings
    assert numbers["bytes_per_second"] == 50.0 / numbers["median"]
    assert numbers["share_of_bandwidth"] == pytest.approx(numbers["bytes_per_second"] / most["bytes_per_second"])
    assert numbers["share_of_matrix"] == pytest.approx(numbers["flops_per_second"] / most["flops_per_second"])
    assert numbers["floor"] == max(50.0 / most["bytes_per_second"], 50.0 / most["flops_per_second"])
    best = found[BANDWIDTH].numbers
    assert best["by"] == "a read"
    assert most["bytes_per_second"] == best["bytes_per_second"] == 100.0 / best["least"]
    assert best["rounds"] > 1  # in one round: a burst


def test_the_best_call_of_a_ceiling_counts_by_its_best_time() -> None:
    both = {MATRIX: Ceiling({"slow": (int, 10.0), "fast": (int, 20.0)})}
    timings = {f"{MATRIX}: {name}": summarise(taken) for name, taken in (("slow", [4.0, 2.0, 8.0]), ("fast", [9.0, 9.0, 1.0]))}
    found = ceilings.reached(both, timings)[MATRIX]
    assert (found.per_second, found.by) == (20.0, "fast")


def test_ceilings_of_this_machine_are_what_its_calls_do() -> None:
    """No call computes what another result would show; each touches the memory and makes the product that it counts."""
    both = ceilings.ceilings(torch.device("cpu"), torch.float32)
    names = {name: set(ceiling.calls) for name, ceiling in both.items()}
    assert {"three reads and a write", "a copy", "an update in place", "a read"} == names[BANDWIDTH]
    assert {"a product", "a product by a transposed matrix", "a convolution"} <= names[MATRIX]
    for call, amount in both[MATRIX].calls.values():
        with flop_counter() as counter, torch.no_grad():
            call()
        assert counter.get_total_flops() == amount
    stream = ceilings.streams(torch.device("cpu"), torch.float32)
    assert both[BANDWIDTH].calls["three reads and a write"][1] == stream.nbytes
    assert both[BANDWIDTH].calls["a read"][1] == stream.nbytes / 2 >= 2 * cache_bytes(torch.device("cpu"))


@pytest.mark.parametrize(("value", "said"), [(0.5, "50%"), (1.004, "100%"), (1.44, "144% †")])
def test_a_share_above_its_ceiling_is_marked(value: float, said: str) -> None:
    assert share(value) == said


def test_a_graphs_memory_is_what_its_capture_took(monkeypatch: pytest.MonkeyPatch, free_memory: Callable) -> None:
    """A stand-in for the allocator, and one for graphs, whose replay runs no Python and so takes nothing from it."""
    fake_graphs.install(monkeypatch)
    held = {"now": 7, "most": 7}

    def compute() -> Tensor:
        held["now"] += 1000
        held["most"] = max(held.values())
        held["now"] -= 900
        return right().add(0)

    allocator = {
        "reset_peak_memory_stats": lambda device: held.update(most=held["now"]),
        "memory_allocated": lambda device: held["now"],
        "max_memory_allocated": lambda device: held["most"],
    }
    for name, stand_in in allocator.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    free_memory(2**30)
    gpu = torch.device("cuda")
    provider = Provider("ours, CUDA graph", lambda: recorded(compute, gpu), traced=False)
    row, replay = contests.check(replace(contest(provider), device=gpu), provider)
    assert row.numbers["peak_bytes"] == 1000
    assert contests.observed(replay, gpu)[1] == 0


def test_memory_is_what_operators_allocate(tmp_path: Path) -> None:
    found = held(tmp_path / "rows.jsonl", Provider("ours", lambda: lambda: torch.ones(1024, 1024).mean() * EXACT))
    assert 4 * 2**20 <= found["ours"].numbers["peak_bytes"] < 5 * 2**20


def test_rows_say_what_they_belong_to(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = held(path, Provider("ours", lambda: right))["ours"]
    assert (row.suite, row.case, row.dtype, row.device, row.command) == ("test", {"frames": 4}, "float32", "cpu", COMMAND)
    assert row.machine["torch"] == torch.__version__
    assert row.outcome == "complete"
    assert row.at
    assert [json.loads(line)["schema"] for line in path.read_text().splitlines()] == [2, 2, 2]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit], ids=["interrupt", "terminate"])
def test_an_interrupted_run_keeps_its_rows_and_says_so(tmp_path: Path, stop: type[BaseException]) -> None:
    path = tmp_path / "rows.jsonl"

    def cut() -> Callable[[], Tensor]:
        raise stop

    with ResultFile(path, COMMAND) as rows:
        hold(contest(Provider("ours", lambda: right)), rows, Pace(1, 0))
    both = [contest(Provider("first", lambda: right)), contest(Provider("ours", cut))]
    with pytest.raises(stop), ResultFile(path, COMMAND) as rows:
        any(hold(one, rows, Pace(1, 0)) is None for one in both)
    assert [(row.provider, row.outcome) for row in read([path]) if row.status == OK] == [
        ("ours", "complete"),
        ("first", INTERRUPTED),
    ]


def test_a_run_that_was_killed_is_interrupted_too_and_the_file_can_go_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    killed = ResultFile(path, COMMAND)
    killed.write(ResultRow("test", {}, "ours"))
    with path.open("a") as file:
        file.write('{"schema": 2, "run": "half a li')
    assert [row.outcome for row in read([path])] == [INTERRUPTED]
    with ResultFile(path, COMMAND) as rows:
        rows.write(ResultRow("test", {}, "again"))
    assert [(row.provider, row.outcome) for row in read([path])] == [("ours", INTERRUPTED), ("again", "complete")]


def test_another_schema_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "old.jsonl"
    path.write_text('{"name": "ours", "machine": {"commit": "0123456789abcdef"}}\n')
    with pytest.raises(
        ValueError, match=r"old.jsonl was written with schema 1 and this is schema 2: measure again .* 0123456789ab\)"
    ):
        read([path])
    with pytest.raises(ValueError, match="schema 1"):
        ResultFile(path, COMMAND)


def test_what_is_no_results_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no results at .*absent.jsonl; make some with"):
        read([tmp_path / "absent.jsonl"])
    path = tmp_path / "README.md"
    path.write_text("# words\nmore\n")
    with pytest.raises(ValueError, match=r"line 1, is not JSON .*: not a results file"):
        read([path])


def test_a_row_names_the_first_line_of_an_error() -> None:
    assert sentence(ValueError("\n  too long\nmore")) == "ValueError: too long"
    assert sentence(RuntimeError()) == "RuntimeError: no message"


@pytest.mark.parametrize(("value", "said"), [(1234.5, "1234 s"), (2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-6, "4.56 us")])
def test_durations_carry_their_unit(value: float, said: str) -> None:
    assert seconds(value) == said
