"""Randomized blending and warp error against recorded numbers of the published implementation."""

import numpy as np
import pytest
from conftest import GOLDEN

from vstar_engine.config.windows import WindowPlan
from vstar_engine.verification.blend_judges import BLEND_KINDS
from vstar_engine.verification.case import Judge
from vstar_engine.verification.golden import Golden
from vstar_engine.verification.verify import verify

STREAMING = Golden(GOLDEN.parent / "golden_streaming")
JUDGED = {
    "blend_x0": {"window_starts", "noised_start", "x0_blended", "out"},
    "blend_xprev": {"start", "out"},
    "overlap_probability": {"code_8", "code_12", "paper_8", "paper_12"},
    "mawe": {"warped", "occluded", "warp_error", "mean_flow", "mean_of_ratios", "ratio_of_means"},
}
CASES = [case for case in STREAMING.cases if case["kind"] in BLEND_KINDS]


def test_every_case_agrees():
    verdicts = [verdict for verdict in verify(STREAMING) if verdict.kind in BLEND_KINDS]
    assert {verdict.kind for verdict in verdicts} == set(JUDGED)
    assert all(verdict.ok for verdict in verdicts), verdicts


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_every_output_is_judged(case):
    judge = Judge(STREAMING, case, "cpu")
    BLEND_KINDS[case["kind"]](judge)
    assert {finding.output for finding in judge.findings} == JUDGED[case["kind"]]


def test_other_cuts_do_not_pass():
    judge = Judge(STREAMING, STREAMING.case("blend_xprev_f20_w8_o4"), "cpu")
    judge.arrays["cuts"] = np.zeros_like(judge.arrays["cuts"])
    BLEND_KINDS["blend_xprev"](judge)
    assert [finding.output for finding in judge.findings if not finding.ok] == ["out"]


def test_our_windows_cover_what_the_published_loop_leaves_out():
    for frames, window, overlap, _ in STREAMING.inputs(STREAMING.case("window_lengths"))["accepted"].tolist():
        if frames <= window:
            continue
        plan = WindowPlan(frames, window, overlap)
        covered = {frame for start in plan.starts for frame in range(start, start + window)}
        assert covered == set(range(frames))
