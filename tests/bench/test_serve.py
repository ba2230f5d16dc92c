"""The load on a server: when requests come, how a run is reduced, and a rehearsal against a real one."""

import argparse
import math
from itertools import pairwise

import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from vstar_engine.bench.commands import serve
from vstar_engine.bench.commands.serve import BURST, POISSON, Outcome, arrivals, judged, measured, percentile
from vstar_engine.bench.harness.contest import Pace
from vstar_engine.bench.harness.rows import ResultFile, ResultRow, read
from vstar_engine.bench.report.serve_tables import serve as table
from vstar_engine.commands.main import main


def test_arrivals_are_all_at_once_or_at_random_with_the_rate_asked_for():
    assert arrivals(BURST, 5, 2.0, seed=0) == [0.0] * 5
    times = arrivals(POISSON, 4000, 2.0, seed=0)
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.5, rel=0.05)
    # of an exponential the spread is the mean
    assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(0.5, rel=0.1)
    assert arrivals(POISSON, 9, 2.0, seed=1) == arrivals(POISSON, 9, 2.0, seed=1) != arrivals(POISSON, 9, 2.0, seed=2)


@pytest.mark.parametrize(("p", "wanted"), [(50, 2.0), (75, 3.0), (95, 4.0), (99, 4.0)])
def test_a_percentile_is_a_value_that_was_measured(p, wanted):
    assert percentile([3.0, 1.0, 4.0, 2.0], p) == wanted


def test_what_was_refused_or_failed_was_not_served_in_time():
    outcomes = [Outcome(0.01, 1.0, "completed"), Outcome(0.02, 3.0, "completed")]
    outcomes += [Outcome(0.03, 0.5, "failed"), Outcome(0.04, math.inf, "HTTP 429")]
    numbers = measured(outcomes, whole=4.0, slo=2.0)
    assert (numbers["median"], numbers["p99"], numbers["post_p99"]) == (2.0, 3.0, 0.04)
    assert (numbers["attained"], numbers["throughput"]) == (0.25, 0.5)
    assert (numbers["completed"], numbers["failed"], numbers["refused"]) == (2, 1, 1)
    with pytest.raises(RuntimeError, match="no video was completed: HTTP 429"):
        measured(outcomes[3:], 1.0, 1.0)


ROW = ResultRow("serve", {"frames": 4}, "vstar-engine serve")


@pytest.mark.parametrize(("p20", "status"), [(0.059, "ok"), (0.061, "failed")])
def test_more_overhead_than_is_allowed_is_a_failure(p20, status):
    numbers = {"median": 1.08, "bare": 1.0, "overhead": 0.08, "overhead_p20": p20, "allowed": 0.06}
    row = judged(ROW, numbers)
    assert (row.status, row.numbers) == (status, numbers)
    if status == "failed":
        assert row.note == "the server adds 80 ms, in four rounds of five more than 61 ms; 60 ms are allowed"


class Nowhere:
    url = "nowhere"


@pytest.fixture
def loads(monkeypatch):
    """Every video takes 2 s alone; what is asked of the server is noted and answered at once."""
    asked = []

    async def drive(url, bodies, times):
        asked.append(len(bodies))
        return [Outcome(0.0, 2.0, "completed") for _ in bodies], 2.0 * len(bodies)

    monkeypatch.setattr(serve, "drive", drive)
    return asked


def parsed(*words):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(words)


def test_what_is_wanted_in_time_is_five_times_one_video_alone(loads, tmp_path):
    with ResultFile(tmp_path / "rows.jsonl", "test") as rows:
        serve.measure(parsed("--parts", "poisson", "burst"), ROW, Nowhere(), tmp_path, rows, Pace())
    assert loads == [1, 1, 24, 24]
    poisson, burst = read([tmp_path / "rows.jsonl"])
    assert (poisson.numbers["slo"], burst.numbers["slo"], poisson.case["rate"]) == (10.0, 10.0, 0.4)


@pytest.mark.parametrize(
    ("budget", "limit", "says"), [(math.inf, 50, "--limit is 50"), (50.5, 99, "and 50 s were left")], ids=["limit", "budget"]
)
def test_a_load_that_does_not_fit_is_not_started(loads, tmp_path, budget, limit, says):
    pace = Pace.within(budget, limit=limit)
    with ResultFile(tmp_path / "rows.jsonl", "test") as rows:
        serve.measure(parsed("--parts", "burst", "poisson"), ROW, Nowhere(), tmp_path, rows, pace)
    assert loads == [1, 1, 24]
    burst, poisson = read([tmp_path / "rows.jsonl"])
    assert (burst.status, poisson.status) == ("ok", "skipped")
    assert poisson.note.startswith("takes about 60 s; ")
    assert says in poisson.note


@pytest.mark.parametrize("words", [["--jobs", "0"], ["--rate", "-1"]])
def test_a_load_that_makes_no_sense_is_refused(words):
    assert main(["bench", "serve", *words]) == 2


@pytest.mark.slow
def test_a_rehearsal_measures_every_part(tmp_path):
    out = tmp_path / "rows.jsonl"
    assert main(["bench", "serve", "--rehearse", "--out", str(out)]) == 0
    rows = read([out])
    assert [row.case["part"] for row in rows] == list(serve.PARTS)
    assert all(row.status == "ok" for row in rows)
    load, alone = table(rows, spread=False)
    assert "poisson" in load
    assert "burst" in load
    assert "bare engine" in alone
