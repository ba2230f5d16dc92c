"""When each state shows: positions, durations, transitions, and the plan that says so."""

import json

import pytest
import torch

from vstar_engine.commands import frame_plan
from vstar_engine.config import request_warnings
from vstar_engine.config.request import Request
from vstar_engine.config.timeline import parse_position, place
from vstar_engine.prompting.interpolation import spread


@pytest.mark.parametrize(
    ("text", "value"), [("12", 12), ("0", 0), ("0.5", 0.5), ("1.0", 1.0), ("50%", 0.5), ("100%", 1.0), ("-3", -3)]
)
def test_positions_are_frames_or_shares(text, value):
    position = parse_position(text)
    assert position == value
    assert type(position) is type(value)


@pytest.mark.parametrize("text", ["", "%", "half", "1,5", "0x10", "5 %%"])
def test_texts_that_are_no_position(text):
    with pytest.raises(ValueError, match="a position is a frame"):
        parse_position(text)


PLACES = [
    ((3, 9, "linear"), {}, [0, 4, 8]),
    ((3, 9, "linear"), {"at": [0, 2, 8]}, [0, 2, 8]),
    ((3, 9, "linear"), {"at": [0.0, 0.25, 1.0]}, [0, 2, 8]),
    ((3, 9, "ease"), {"at": [0, 0.25, 1.0]}, [0, 2, 8]),
    ((3, 9, "hold"), {"at": [0, 3, 5]}, [0, 3, 5]),
    ((1, 9, "linear"), {"at": [0]}, [0]),
    ((3, 9, "linear"), {"durations": [1, 3]}, [0, 2, 8]),
    ((3, 9, "linear"), {"durations": [1, 3, 7]}, [0, 2, 8]),
    ((3, 12, "hold"), {"durations": [1, 1, 2]}, [0, 3, 6]),
    ((2, 64, "hold"), {"durations": [0.5, 1.5]}, [0, 16]),
    ((1, 5, "hold"), {"durations": [3]}, [0]),
    ((5, 64, "linear"), {"durations": [2, 2, 2, 2]}, [0, 16, 32, 47, 63]),
    ((3, 96, "linear"), {"at": [0, "2.5s", "12s"]}, [0, 20, 95]),
    ((3, 96, "hold"), {"at": ["0s", "1s", "2s"], "fps": 16}, [0, 16, 32]),
]


@pytest.mark.parametrize(("state", "where", "frames"), PLACES, ids=str)
def test_places(state, where, frames):
    count, length, mode = state
    assert place(count, length, mode, **where) == frames


@pytest.mark.parametrize(
    ("state", "where", "complaint"),
    [
        ((3, 9, "linear"), {"at": [0, 4]}, "2 positions for 3 states"),
        ((3, 9, "linear"), {"at": [0, 5, 4]}, "ascend from 0 to 8"),
        ((3, 9, "linear"), {"at": [0, 4, 7]}, "ascend from 0 to 8"),
        ((3, 9, "linear"), {"at": [1, 4, 8]}, "ascend from 0 to 8"),
        ((3, 9, "hold"), {"at": [0, 4, 9]}, "at most 8"),
        ((3, 9, "hold"), {"at": [0, 4, 4]}, "at most 8"),
        ((3, 9, "hold"), {"at": [-1, 4, 8]}, "at most 8"),
        ((2, 9, "linear"), {"at": [0, 1.5]}, "0 to 1, got 1.5"),
        ((2, 9, "linear"), {"at": [0, float("nan")]}, "0 to 1, got nan"),
        ((3, 9, "linear"), {"durations": [1]}, "give 2 or 3"),
        ((3, 9, "hold"), {"durations": [1, 1]}, "give 3"),
        ((2, 9, "hold"), {"durations": [1, 0]}, "above 0, got 0"),
        ((2, 9, "hold"), {"durations": [1, float("inf")]}, "finite"),
        ((3, 3, "hold"), {"durations": [1, 1000, 1]}, "too few for the durations"),
        ((2, 9, "hold"), {"at": [0, 4], "durations": [1, 1]}, "not both"),
        ((2, 96, "hold"), {"at": [0, "13s"]}, "13s is behind the end of a video of 96 frames at 8 fps, 12 s"),
        ((2, 96, "hold"), {"at": [0, "-1s"]}, "a time is a number of seconds such as 12s, got '-1s'"),
    ],
    ids=str,
)
def test_places_that_make_no_sense(state, where, complaint):
    count, length, mode = state
    with pytest.raises(ValueError, match=complaint):
        place(count, length, mode, **where)


def test_hold_keeps_the_last_state_to_the_end():
    anchors = torch.arange(3.0).reshape(3, 1, 1)
    assert spread(anchors, 8, "hold", [0, 3, 5]).flatten().tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_ease_meets_linear_at_the_anchors_and_halfway_and_starts_gently():
    anchors = torch.tensor([0.0, 1.0]).reshape(2, 1, 1)
    linear, ease = (spread(anchors, 9, mode).flatten() for mode in ("linear", "ease"))
    assert ease[[0, 4, 8]].tolist() == linear[[0, 4, 8]].tolist() == [0, 0.5, 1]
    assert ease[1] < linear[1]
    assert ease[7] > linear[7]
    assert torch.allclose(ease + ease.flip(0), torch.ones(9))


REQUEST = Request(("snow", "melt", "green"), frames=8, mode="linear", at=(0, 2, 7), negatives=("grass", "", "snow"))


def test_the_plan_is_the_interpolation():
    rows = frame_plan.shares(REQUEST)
    assert rows[0] == {1: 1.0}
    assert rows[1] == {1: 0.5, 2: 0.5}
    assert rows[2] == {2: 1.0}
    assert rows[7] == {3: 1.0}
    assert all(sum(row.values()) == pytest.approx(1) for row in rows)


def test_the_plan_as_text_and_as_json():
    assert frame_plan.as_text(REQUEST).splitlines() == [
        "  1  snow   (not: grass)",
        "  2  melt   (not: )",
        "  3  green   (not: snow)",
        "frame  0         state 1",
        "frame  1         state 1 to 2, 50% of 1",
        "frame  2         state 2",
        "frames 3-6       state 2 to 3, 80% to 20% of 2",
        "frame  7         state 3",
    ]
    content = json.loads(json.dumps(frame_plan.as_json(REQUEST)))
    assert content["at"] == [0, 2, 7]
    assert content["frames"][3] == {"2": 0.8, "3": 0.2}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"at": (0, 9)}, "2 positions for 3 states"),
        ({"durations": (1.0,)}, "1 durations for 3 states"),
        ({"negatives": ("a",)}, "1 negative prompts for 3 states"),
        ({"negatives": ("a", "b", "c"), "negative": "d"}, "not both"),
    ],
    ids=str,
)
def test_requests_that_make_no_sense(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        Request(("a", "b", "c"), frames=8, **settings)


@pytest.mark.parametrize(("at", "mode"), [((0, 0.5, 1), "linear"), ((0, 0.5, 1), "hold"), ((0, 1), "linear")])
def test_a_last_share_that_became_the_frame_1(at, mode):
    """JavaScript writes 1.0 as 1."""
    with pytest.raises(ValueError, match=r"got \[.*1\]; a position of 1 is the second frame, 1\.0 or '100%' the last one"):
        place(len(at), 9, mode, at)


def test_a_last_state_from_the_second_frame_on_is_remarked(caplog):
    def said(*at, frames=9):
        caplog.clear()
        request_warnings.warn_once.cache_clear()
        request_warnings.warn_placed(Request(("a", "b"), frames=frames, mode="hold", at=at))
        return caplog.text

    assert "a position of 1 is the second frame, 1.0 or '100%' the last one: state 2 fills the video from there" in said(0, 1)
    assert [said(0, 1.0), said(0, 2), said(0, 1, frames=2)] == ["", "", ""]
