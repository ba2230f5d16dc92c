"""Values of a body: taken where they mean one thing, else a sentence names the field and what would do."""

import pytest
from pydantic import ValidationError

from vstar_engine.serving.http.field_errors import sentence
from vstar_engine.serving.http.schema import CreateVideo, RemixVideo

TAKEN = [
    ({"seed": "7"}, {"seed": 7}),
    ({"num_frames": "16"}, {"num_frames": 16}),
    ({"num_inference_steps": 4.0}, {"num_inference_steps": 4}),
    ({"num_frames": " 16.0 "}, {"num_frames": 16}),
    ({"fps": "8", "guidance_scale": "7.5", "eta": ".5"}, {"fps": 8.0, "guidance_scale": 7.5, "eta": 0.5}),
    ({"priority": "-3", "n": "1.0"}, {"priority": -3, "n": 1}),
    ({"enhance_prompt": "False"}, {"enhance_prompt": False}),
    ({"enhance_prompt": 1}, {"enhance_prompt": True}),
    ({"spread": "Hold"}, {"spread": "hold"}),
    ({"synopsis": "snow"}, {"synopsis": ["snow"]}),
    ({"synopsis": [{"text": "a", "duration": "2"}]}, {"synopsis": [{"text": "a", "duration": 2.0}]}),
    ({"tar": False}, {"tar": "none"}),
    ({"tar": {"sigma": {"0": "1.5"}, "until": 13.0}}, {"tar": {"sigma": {"0": 1.5}, "until": 13}}),
    ({"metadata": {"take": 3}}, {"metadata": {"take": "3"}}),
]


@pytest.mark.parametrize(("sent", "taken"), TAKEN, ids=lambda value: str(value)[:40])
def test_values_that_mean_one_thing(sent, taken):
    body = CreateVideo.model_validate({"prompt": "a tree", **sent}, strict=True)
    assert body.model_dump(exclude_none=True, exclude={"prompt"}) == taken


REFUSED = [
    ({"num_frames": 4.5}, "num_frames is a whole number, got 4.5"),
    ({"num_frames": "1e3"}, 'num_frames is a whole number, got "1e3"'),
    ({"seed": True}, "seed is a whole number, got true"),
    ({"fps": "nan"}, 'fps is a number, got "nan"'),
    ({"guidance_scale": "1e999"}, 'guidance_scale is a number, got "1e999"'),
    ({"num_frames": "999999"}, "num_frames is at most 10000, got 999999"),
    ({"n": 2}, "n is 1, since a request makes one video, got 2"),
    ({"enhance_prompt": 2}, "enhance_prompt is true or false, got 2"),
    ({"spread": "cubic"}, "spread is 'linear', 'ease' or 'hold', got \"cubic\""),
    (
        {"synopsis": "snow\nthaw"},
        'synopsis is a list of texts, or of objects with text, at, duration and negative, got "snow\\nthaw"',
    ),
    ({"synopsis": ["a", {"text": "b", "at": True}]}, "synopsis[1].at is a frame such as 12, or a share of the clip"),
    ({"synopsis": ["a", {"prompt": "b"}]}, "synopsis[1].prompt: there is no such field; here it is text"),
    ({"synopsis": ["a", {"at": 0}]}, "synopsis[1].text is missing"),
    ({"synopsis": ["a", 5]}, "synopsis[1] is text or an object, got 5"),
    ({"synopsis": []}, "synopsis is empty"),
    (
        {"tar": True},
        'tar is a preset such as "64D1_32D8", "none", or an object with preset, sigma, strength and until, got true',
    ),
    ({"tar": {"strength": "x"}}, 'tar.strength is a number, got "x"'),
    ({"tar": {"sigma": [1, 8]}}, "tar.sigma is a number, or an object of numbers by UNet level"),
    ({"tar": {"sigma": {"fine": 1}}}, 'tar.sigma.fine is a UNet level, 0 to 9, got "fine"'),
    ({"metadata": {"a": True}}, "metadata.a is text, got true"),
    ({"metadata": {"a": "x" * 600}}, "metadata.a has at most 512 letters, got 600"),
    ({"size": [64, 32]}, "size is WIDTHxHEIGHT in pixels, such as 128x96, got [64, 32]"),
    ({"embeddings": "../x"}, "embeddings is an id of letters, digits, dots, dashes and underscores"),
    ({"numFrames": 4}, "numFrames: there is no such field; here it is num_frames"),
    ({"prompt": "a\0"}, "prompt is text without NUL"),
]


@pytest.mark.parametrize(("sent", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_other_values_are_told_what_would_do(sent, said):
    body = {"prompt": "a tree", **sent}
    with pytest.raises(ValidationError) as caught:
        CreateVideo.model_validate(body, strict=True)
    told, field, strange = sentence(caught.value.errors(include_url=False), body)
    assert told.startswith(said)
    assert field == next(iter(sent))
    assert strange == ("no such field" in said)


def test_a_missing_prompt_is_named():
    with pytest.raises(ValidationError) as caught:
        RemixVideo.model_validate({}, strict=True)
    assert sentence(caught.value.errors(), {}) == ("prompt is missing", "prompt", False)
