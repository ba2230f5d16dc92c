"""A clip is checked before its states are known; with states it is a request, which knows their frames."""

from dataclasses import asdict, replace

import pytest

from vstar_engine.config.models import MODELS
from vstar_engine.config.request import Clip, Request
from vstar_engine.config.sampling import Tar
from vstar_engine.prompting.synopsis import Synopsis

TWO = Synopsis("a to b", ("a", "b"), at=(0, 0.5), negatives=("x", ""))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"frames": 0}, "frames must be 1 to 10000, got 0"),
        ({"seed": -1}, "a seed is a whole number from 0"),
        ({"mode": "cubic"}, "mode must be one of linear, ease, hold, got 'cubic'"),
        ({"fps": 0.0}, "fps must be 0.001 to 1000, got 0.0"),
        ({"negative": "x", "negatives": ("y",)}, "one negative prompt for the whole video or one for each state"),
    ],
)
def test_what_needs_no_states_is_checked_without(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        Clip(**settings)


@pytest.mark.parametrize(
    ("settings", "count", "complaint"),
    [
        ({"frames": 4}, 5, "5 states need at least 5 frames, got 4"),
        ({"negatives": ("x", "y")}, 3, "2 negative prompts for 3 states"),
        ({"at": (0, 1.0)}, 3, "2 positions for 3 states"),
        ({"durations": (1.0,)}, 3, "1 durations for 3 states"),
    ],
)
def test_a_number_of_states_that_does_not_fit_is_known_before_them(settings, count, complaint):
    clip = Clip(**settings)
    with pytest.raises(ValueError, match=complaint):
        clip.places(count)
    with pytest.raises(ValueError, match=complaint):
        clip.showing(Synopsis("", tuple("abcdefg"[:count])))


def test_a_clip_shows_a_synopsis_as_it_says_itself():
    request = Clip(frames=9, seed=3, mode="hold", negative="z").showing(TWO)
    assert request == Request(("a", "b"), 9, 3, mode="hold", at=(0, 0.5), negatives=("x", "z"))
    assert request.anchors == [0, 4]


def test_what_a_clip_says_of_states_comes_first():
    request = Clip(frames=9, durations=(1.0, 3.0), mode="hold", negatives=("u", "v")).showing(TWO)
    assert (request.at, request.durations, request.negatives, request.negative) == ((), (1.0, 3.0), ("u", "v"), "")
    assert request.anchors == [0, 2]


def test_a_request_is_a_clip_with_states_in_front():
    clip = Clip(frames=5, tar=Tar({0: 2.0})).fitted(MODELS["mini"])
    request = clip.showing(Synopsis("a", ("a",)))
    assert asdict(request) == {"states": ("a",), **asdict(clip)}
    assert next(iter(asdict(request))) == "states"
    assert isinstance(clip, Clip)
    assert not isinstance(clip, Request)


def test_states_are_placed_once():
    request = Request(("a", "b"), 9)
    assert request.anchors is request.anchors
    assert replace(request, frames=5).anchors == [0, 4]
    assert asdict(request).keys() == asdict(Request(("a",))).keys()


def test_a_request_without_states():
    with pytest.raises(ValueError, match="there are no states to show"):
        Request(())
