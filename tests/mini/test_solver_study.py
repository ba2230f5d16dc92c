"""The study of samplers: one Brownian path for all steps, and verdicts by paired intervals."""

from dataclasses import replace

import pytest
import torch

from tools.mini.claims import solver_tables, solvers
from vstar_engine.sampling.schedule import Schedule


def increments(path, schedule, rescaled):
    """A schedule's noise, each step's times its standard deviation: increments of the path, the noisiest first."""
    ratio = schedule.alpha * (schedule.scale**2 if rescaled else 1) / (1 - schedule.alpha)
    least = schedule.alpha_prev[0] / (1 - schedule.alpha_prev[0])
    after = [least, *ratio[:-1]]
    variances = [late - early for late, early in zip(after, ratio, strict=True)][::-1]
    return [variance**0.5 * path.noise(schedule, index) for index, variance in enumerate(variances)]


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m-sde"])
def test_steps_of_any_length_read_one_brownian_path(sampler):
    path = solvers.BrownianPath(1, (20_000,))
    fine, coarse = (
        increments(path, replace(Schedule.ddim(steps, spacing="trailing"), sampler=sampler), sampler != "ddim")
        for steps in (20, 10)
    )
    assert all(abs(float(path.noise(Schedule.ddim(8), index).std()) - 1) < 0.03 for index in range(8))
    for index, whole in enumerate(coarse):
        halves = fine[2 * index] + fine[2 * index + 1]
        torch.testing.assert_close(halves, whole, rtol=1e-3, atol=1e-3)


def test_a_case_is_measured_against_many_steps_of_its_own_kind(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(solvers, "REFERENCE", 3)
    maker = solvers.Maker(mini, tmp_path)
    cases = [solvers.Case("ddim", eta, "leading", 3, True, 0, 5) for eta in (0.0, 1.0)]
    cases.append(solvers.Case("unipc", 1.0, "trailing", 3, True, 0, 5))
    assert maker.distance(cases[0]) is None
    assert [row["case"]["sampler"] for row in maker.measured(cases)] == ["ddim", "ddim", "unipc"]
    same, along_one_path, other = map(maker.distance, cases)
    assert max(same, along_one_path) < 1e-3 < other


def row(arm, spacing, steps, story, **numbers):
    case = {**vars(arm), "spacing": spacing, "steps": steps, "tar": True, "story": story, "frames": 16}
    measures = {name: {"dynamics": 0.5, "neighbours": 0.9} for name in ("pixels", "features", "factors")}
    usual = dict.fromkeys(("visited", "held", "at_anchors", "alignment", "stated"), 0.5)
    return {"case": case, "numbers": {**measures, **usual, "cuts": 0.0, **numbers}}


def test_a_measure_is_worse_where_its_paired_interval_says_so():
    unipc = solvers.Arm("unipc")
    found = [row(solvers.ODE, "leading", 25, story, held=0.5 + 0.1 * story) for story in range(4)]
    found += [row(unipc, "leading", 12, story, held=0.48 + 0.1 * story, cuts=[0, 1, 0, 0][story]) for story in range(4)]
    found += [row(solvers.ODE, "leading", 12, story, held=0.4 + 0.1 * story) for story in range(4)]
    made = solver_tables.tables(found)
    lines = made["solvers-verdicts-16-tar"].splitlines()[2:]
    assert lines == [
        "| 12 | ddim, eta 0 | leading | states held -0.100 [-0.100, -0.100] | - | 4 |",
        "| 12 | unipc | leading | states held -0.020 [-0.020, -0.020] | states held -0.100 [-0.100, -0.100] | 4 |",
    ]
    assert made["solvers-verdicts-64-tar"] == made["solvers-distances-16-tar"] == ""
