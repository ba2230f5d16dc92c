"""Settings as callers have them: numpy's numbers and lists are taken, other kinds are a sentence before the work."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from vstar_engine.commands.inspect import lacking
from vstar_engine.config.request import Request
from vstar_engine.config.sampling import Sampling, Tar


def test_numpys_numbers_and_lists_become_pythons():
    tar = Tar({0: np.float32(1.0)}, np.float64(0.5), np.int64(3))
    sampling = Sampling(np.int32(2), guidance=np.float32(3.0))
    request = Request(
        ["snow", "thaw"],
        np.int64(4),
        np.int64(3),
        [32, np.int64(64)],
        sampling,
        tar,
        fps=np.float32(8),
        at=[0, np.float64(1.0)],
    )
    assert (request.size, request.frames, request.seed, request.at) == ((32, 64), 4, 3, (0, 1.0))
    assert hash(request.size)
    assert json.loads(json.dumps(asdict(request)))["fps"] == 8.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"frames": 4.0}, r"frames must be a whole number, got 4\.0"),
        ({"seed": True}, "a seed must be a whole number, got True"),
        ({"fps": "8"}, "fps must be a number, got '8'"),
        ({"fps": float("nan")}, r"fps must be 0\.001 to 1000, got nan"),
        ({"size": 64}, r"size must be \(height, width\) in pixels, got 64"),
        ({"size": (64, 32.5)}, r"a width must be a whole number, got 32\.5"),
        ({"negative": None}, "negative must be text, got None"),
        ({"states": ("snow", float("nan"))}, "each of states must be text, got nan"),
        ({"states": "snow"}, "states must be a sequence of texts, got 'snow'"),
        ({"durations": ("1", "2")}, "a duration must be a number, got '1'"),
    ],
)
def test_other_kinds_are_a_sentence(settings, said):
    with pytest.raises(ValueError, match=said):
        Request(**{"states": ("snow", "thaw"), **settings})


@pytest.mark.parametrize("sigma", [1e200, 1e-200])
def test_a_sigma_that_no_float_squares_is_refused(sigma):
    with pytest.raises(ValueError, match=r"sigma is 1e-06 to 1e\+06 frames"):
        Tar({0: sigma})


def test_a_file_that_says_less_is_told_what_it_lacks():
    assert lacking({"engine": "vstar-engine", "request": None}) == [
        *("model", "device", "dtype"),
        *("request.states", "request.frames", "request.size", "request.seed"),
    ]
