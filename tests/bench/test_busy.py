"""A video beside busy neighbours: what is fair, what is judged, and a rehearsal with real ones."""

import psutil
import pytest

from vstar_engine.bench.commands import busy
from vstar_engine.bench.commands.busy import DEFAULT, OURS, PASSIVE, WAYS, Denoiser, fair, judged, neighbours
from vstar_engine.bench.harness.rows import FAILED, OK, ResultRow, read
from vstar_engine.bench.report.tables import TABLES
from vstar_engine.commands.main import main


@pytest.mark.parametrize(
    ("ours", "spinning", "cores", "times"),
    [(2, 0, 2, 1.0), (2, 1, 2, 1.5), (2, 2, 2, 2.0), (2, 1, 4, 1.0), (2, 6, 4, 2.0), (1, 1, 1, 2.0)],
)
def test_the_fair_time_is_that_of_a_core_shared_evenly(ours, spinning, cores, times):
    assert fair(3.0, ours, spinning, cores) == 3.0 * times


def row(provider, count):
    case = {"model": "mini", "frames": 16, "steps": 12, "size": "128x96", "neighbours": count}
    return ResultRow("busy", case, provider, "float32", "cpu", machine={"cpu": "A CPU", "threads": 2}, at="2026-11-30")


@pytest.mark.parametrize(
    ("provider", "count", "seconds", "status"),
    [
        (OURS, 1, 1.94, OK),
        (OURS, 1, 1.96, FAILED),
        (OURS, 2, 2.59, OK),
        (OURS, 2, 2.61, FAILED),
        (OURS, 0, 9.0, OK),
        (DEFAULT, 1, 30.0, OK),
    ],
)
def test_ours_may_take_1_3_times_the_fair_time(provider, count, seconds, status):
    found = judged(row(provider, count), [seconds] * 3, quiet=1.0, ours=2, cores=2)
    assert found.status == status
    assert found.numbers["times_quiet"] == pytest.approx(seconds)
    assert found.numbers["allowed"] == pytest.approx({0: 1.3, 1: 1.95, 2: 2.6}[count])


def test_the_table_says_how_many_times_the_quiet_time_and_what_failed():
    times = {(OURS, 0): 1.0, (OURS, 1): 1.5, (OURS, 2): 3.0, (DEFAULT, 0): 1.0, (DEFAULT, 1): 30.0}
    rows = [judged(row(way, count), [taken] * 3, 1.0, 2, 2) for (way, count), taken in times.items()]
    (table,) = TABLES["busy"](rows, False)
    assert "| busy processes | alone | 1 (allowed 1.95x) | 2 (allowed 2.60x) |" in table
    assert "| spins 300 times, then sleeps | 1 s | 1.5 s (1.50x) | 3 s (3.00x), failed |" in table
    assert "| waits by OpenMP's default | 1 s | 30 s (30x) |  |" in table


def test_neighbours_go_when_they_are_not_wanted():
    def spinning():
        return [child for child in psutil.Process().children() if busy.SPIN in child.cmdline()]

    with neighbours(2):
        assert len(spinning()) == 2
    assert spinning() == []


def test_a_denoiser_waits_as_it_is_told_whatever_is_set_here(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    passive = {"OMP_WAIT_POLICY": "passive"}
    for way, wanted in {PASSIVE: passive, OURS: passive | {"GOMP_SPINCOUNT": "300"}, DEFAULT: {}}.items():
        with Denoiser(way, 4, 1) as denoiser:
            assert denoiser.seconds() > 0
            found = psutil.Process(denoiser.process.pid).environ()
            assert {name: found[name] for name in busy.threads.WAITING if name in found} == wanted


def test_a_denoiser_that_ended_is_said_so():
    with Denoiser(PASSIVE, 4, 1) as denoiser:
        denoiser.process.kill()
        with pytest.raises(RuntimeError, match="the process that denoises ended with -9"):
            denoiser.seconds()


@pytest.mark.slow
def test_a_rehearsal_writes_a_row_for_each_way_and_number(tmp_path):
    out = tmp_path / "rows.jsonl"
    main(["bench", "busy", "--rehearse", "--neighbours", "1", "--out", str(out)])
    found = read([out])
    assert {(each.provider, each.case["neighbours"]) for each in found} == {(w, n) for w in WAYS for n in (0, 1)}
    assert all(each.numbers["median"] > 0 and each.machine["commit"] for each in found)


def test_a_neighbour_less_is_refused(capsys):
    assert main(["bench", "busy", "--neighbours", "0"]) == 2
    assert "at least 1 neighbour, got 0" in capsys.readouterr().err
