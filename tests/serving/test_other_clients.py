"""Bodies, paths and targets as other servers' clients send them: taken where they mean one thing, else told the field here."""

import h11
import pytest

from vstar_engine.serving.errors import ApiError
from vstar_engine.serving.http.connections import _with_path_alone
from vstar_engine.serving.http.other_clients import our_body, our_form, our_path
from vstar_engine.serving.http.request_body import unflatten
from vstar_engine.serving.http.unknown_fields import unknown_field
from vstar_engine.serving.jobs.result_files import without_folders


@pytest.mark.parametrize("size", ["64x32", "64X32", "64\u00d732", "64*32", " 64 x 32 "])
def test_sizes_that_mean_one_thing(size):
    assert our_body({"size": size}) == {"size": "64x32"}


def test_sizes_of_two_fields_and_none():
    for width, height in (("64", 32), (64.0, "32"), ("64.0", 32)):
        assert our_body({"width": width, "height": height}) == {"size": "64x32"}
    assert our_body({"size": "auto"}) == {"size": None}
    with pytest.raises(ApiError, match="width and height say 64x32: give one of them"):
        our_body({"width": 64, "height": 32, "size": "96x64"})


@pytest.mark.parametrize("size", ["720p", "64:32", "16:9", "64"])
def test_other_sizes_are_told_the_form(size):
    with pytest.raises(ApiError, match="size is WIDTHxHEIGHT in pixels, such as 128x96, got"):
        our_body({"size": size})


@pytest.mark.parametrize("seconds", [4, 4.0, "4", "4.0", "4s", "04"])
def test_seconds_that_are_whole(seconds):
    assert our_body({"seconds": seconds}) == {"seconds": 4}


@pytest.mark.parametrize("seconds", [4.5, "four", "4.5", True, [4]])
def test_other_seconds_are_told_the_form(seconds):
    with pytest.raises(ApiError, match="seconds is a whole number, such as 4"):
        our_body({"seconds": seconds})


def test_seeds():
    assert [our_body({"seed": seed})["seed"] for seed in (-1, "-1", -1.0, 1.0, 7, "7", "7.0")] == [-1, -1, -1, 1, 7, 7, 7]
    for seed in (2**32, 2**53, -2, "4294967296", -2.0):
        with pytest.raises(ApiError, match="seed is 0 to 4294967295, or -1 for one that is drawn"):
            our_body({"seed": seed})


FORMS = {
    "numbers": ([("synopsis[1]", "thaw"), ("synopsis[0]", "snow")], {"synopsis": ["snow", "thaw"]}),
    "numbered objects": (
        [("synopsis[0][text]", "snow"), ("synopsis[0][at]", "0"), ("synopsis[1][text]", "thaw"), ("synopsis[1][at]", "0.5")],
        {"synopsis": [{"text": "snow", "at": "0"}, {"text": "thaw", "at": "0.5"}]},
    ),
    "a name twice": ([("synopsis", "snow"), ("synopsis", "thaw")], {"synopsis": ["snow", "thaw"]}),
    "a name once": ([("subprompts", "snow")], {"subprompts": ["snow"]}),
    "JSON": (
        [("synopsis", '["snow", "thaw"]'), ("tar", '{"preset": "64D1"}')],
        {"synopsis": ["snow", "thaw"], "tar": {"preset": "64D1"}},
    ),
    "a preset": ([("tar", "64D1")], {"tar": "64D1"}),
    "empty fields": ([("prompt", "a"), ("seed", ""), ("negative_prompt", "")], {"prompt": "a"}),
    "more than ten": ([(f"synopsis[{i}]", str(i)) for i in reversed(range(12))], {"synopsis": [str(i) for i in range(12)]}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_other_clients(form):
    fields, wanted = FORMS[form]
    assert unflatten(our_form(fields)) == wanted


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ([("synopsis[0]", "a"), ("synopsis[2]", "b")], "synopsis is numbered from 0 without gaps, got 0, 2"),
        ([("metadata", '{"who":')], "metadata holds JSON that cannot be read"),
    ],
)
def test_forms_that_mean_nothing(fields, said):
    with pytest.raises(ApiError, match=said):
        our_form(fields)


def test_an_unknown_field_names_ours():
    assert unknown_field("duration") == "there is no such field; here it is seconds (or num_frames)"
    assert unknown_field("stream").endswith("/v1/videos/{id}/events")
    assert unknown_field("colour") == "there is no such field"
    assert [unknown_field(name).rpartition(" ")[2] for name in ("durationSeconds", "promptText", "n_frames")] == [
        *("seconds", "prompt", "num_frames")
    ]
    assert unknown_field("numFrames", ("num_frames",)).endswith("here it is num_frames")
    assert unknown_field("prompt", of_state=True).endswith("here it is text")


def test_paths_and_targets():
    assert [our_path(path) for path in ("/", "/v1/videos/", "//v1/videos", "/livez")] == [
        "/",
        "/v1/videos",
        "/v1/videos",
        "/livez",
    ]

    def path(target):
        headers = [("host", "x")]
        return _with_path_alone(h11.Request(method="GET", target=target, headers=headers)).target

    assert [path(t) for t in ("http://localhost/livez?a=b", "HTTPS://x", "/a?u=http://b")] == [
        b"/livez?a=b",
        b"/",
        b"/a?u=http://b",
    ]


def test_a_served_file_tells_no_folders():
    made = {
        "model": "mini",
        "loras": [{"lora": "/srv/secret/style.safetensors:0.8", "sha256": "ab"}],
        "embeddings": "/srv/e.safetensors",
    }
    told = {**made, "loras": [{"lora": "style.safetensors:0.8", "sha256": "ab"}], "embeddings": "e.safetensors"}
    assert without_folders(made) == told
