"""The study of long videos: its videos, its tables, and a page that is current."""

import json

import pytest

from tools.mini.long_video import arms, study
from tools.mini.long_video.tables import tables

NUMBERS = {
    "seam_ratio": 1.5,
    "start_ratio": None,
    "cuts": 0,
    "drift": 0.1,
    "dynamics": 0.2,
    "flicker": 0.01,
    "mawe": 9.0,
    "stated": 0.5,
}


def rows(arm, *ratios, frames=240, tar=True):
    return [
        {
            "case": {"arm": arm, "story": i, "seed": 0, "frames": frames, "tar": tar},
            "cpu_seconds": 10.4,
            "numbers": NUMBERS | {"seam_ratio": ratio},
        }
        for i, ratio in enumerate(ratios)
    ]


def test_every_video_is_one_that_can_be_made_and_none_twice():
    found = list(arms.cases())
    assert len({case.key for case in found}) == len(found) == 10 * 6 * 2 + 10 * 3 + 2 * 4
    assert {case.request.frames for case in found} == {240, 1200}
    assert all(case.plan.borders for case in found)
    one = arms.Case("one pass", 0, 0, 240, True)
    assert (one.request.plan, one.plan.window) == (None, 64)


def test_tables_have_a_row_for_each_arm_that_was_measured():
    made = tables([*rows("randomized", 1.0, 2.0), *rows("none", 3.0), *rows("none", 1.0, tar=False)])
    assert made["240"].splitlines() == [
        "| arm | videos | seams | starts | cuts | CPU s |",
        "|---|--:|--:|--:|--:|--:|",
        "| randomized | 2 | 1.5 ± 0.71 | - | 0 ± 0 | 10 |",
        "| none | 1 | 3 | - | 0 | 10 |",
    ]
    assert made["240_without_tar_change"].splitlines()[-1] == "| none | 0.1 | 0.2 | 0.01 | 9 | 0.5 |"
    assert made["1200"] == ""


def test_the_page_has_the_tables_of_the_results():
    made = tables(study.rows(study.RESULTS))
    assert study.between_markers(study.DOCUMENT.read_text(), "long_video", made, made.__getitem__) == study.DOCUMENT.read_text()


@pytest.mark.slow
def test_a_video_becomes_a_row_that_json_has(mini, monkeypatch):
    pytest.importorskip("scenedetect")
    monkeypatch.setattr(study, "engine", lambda: mini)
    monkeypatch.setattr(arms, "STEPS", 2)
    made = study.row(arms.Case("randomized", 0, 0, 80, True))
    assert json.loads(json.dumps(made)) == made
    assert made["numbers"]["frames"] == 80
    assert made["numbers"]["seam_ratio"] > 0
