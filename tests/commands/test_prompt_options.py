"""From one prompt to a video on the command line: offline, by an endpoint, and from a bundle on another machine."""

import json
import os
import shlex

import pytest

from support.chat_server import ChatServer, hang
from vstar_engine import loading
from vstar_engine.commands.embed import INDEX
from vstar_engine.commands.main import main
from vstar_engine.prompting.embeddings import Embeddings

TINY = ["generate", "--model", "mini", "--frames", "4", "--size", "32x32", "--steps", "1"]
GOOD = json.dumps({"states": ["a young boy", "an old man"]})


@pytest.fixture
def here(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("VSTAR_")]:
        if name != "VSTAR_CACHE":
            monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VSTAR_CACHE", str(tmp_path / "cache"))


def test_from_one_prompt_to_video_offline(here, capsys):
    assert main([*TINY, "a landscape from winter to spring"]) == 0
    out = capsys.readouterr().out
    assert "synopsis_source: offline\n  a landscape covered in thick snow, bare trees\n" in out
    assert main(["inspect", "vstar.mp4"]) == 0
    out = capsys.readouterr().out
    made = json.loads(out[: out.rindex("}") + 1])
    assert len(made["request"]["states"]) == 4  # as many as there are frames, of five
    assert (made["prompt"], made["synopsis_source"]) == ("a landscape from winter to spring", "offline")
    assert main([*shlex.split(out.splitlines()[-1])[1:], "--force"]) == 0


def test_from_one_prompt_to_video_by_an_endpoint(here, capsys):
    with ChatServer(GOOD) as server:
        words = ["a boy is getting old", "--llm-url", server.url, "--llm-model", "mock", "--json"]
        assert main([*TINY, *words]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["synopsis_source"] == "llm"
    assert result["request"]["states"] == ["a young boy", "an old man"]


def test_settings_are_checked_before_the_endpoint_is_asked(here):
    with ChatServer(GOOD) as server:
        words = ["a boy", "--llm-url", server.url, "--llm-model", "mock"]
        assert main([*TINY, *words, "--size", "33x33"]) == 2
        assert main([*TINY, *words, "--out", "no/a.mp4"]) == 4
        assert server.requests == []


def test_no_synopsis_uses_the_prompt_as_it_is(here, capsys):
    assert main([*TINY, "day to night", "--no-synopsis", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["request"]["states"] == ["day to night"]


@pytest.mark.parametrize("answer", [500, 401, hang, "no"], ids=["500", "401", "hang", "prose"])
def test_a_failing_endpoint_is_replaced_or_required(here, capsys, answer):
    with ChatServer(answer) as server:
        words = ["synopsis", "day to night", "--llm-url", server.url, "--llm-model", "mock", "--llm-timeout", "0.3"]
        assert main(words) == 0
        captured = capsys.readouterr()
        assert "the offline rules serve instead" in captured.err
        assert json.loads(captured.out)[0]["synopsis_source"] == "offline"
        assert main([*words, "--llm-required", "--out", "s.json"]) == 8
        assert capsys.readouterr().err.count("\n") == 1
    assert list(here.iterdir()) == []


def test_a_synopsis_file_is_what_generate_takes(here, capsys):
    (here / "prompts.txt").write_text('day to night\n{"prompt": "p", "subprompts": ["a", {"text": "b", "negative": "c"}]}\n')
    assert main(["synopsis", "snow", "--prompts", "prompts.txt", "--out", "s.json"]) == 0
    assert "wrote s.json: 3 synopses" in capsys.readouterr().out
    assert main(["synopsis", "snow", "--prompts", "prompts.txt", "--out", "s.jsonl"]) == 0
    written = json.loads((here / "s.json").read_text())
    assert written == [json.loads(line) for line in (here / "s.jsonl").read_text().splitlines()]
    assert [entry["synopsis_source"] for entry in written] == ["prompt", "offline", "given"]
    assert main([*TINY, "--synopsis", "s.json", "--frames", "5"]) == 0
    assert len(list(here.glob("vstar-*.mp4"))) == 3


def test_the_key_comes_from_the_environment(here, monkeypatch, own_cache):
    monkeypatch.setenv("MY_KEY", "secret")
    with ChatServer(GOOD) as server:
        monkeypatch.setenv("VSTAR_LLM_URL", server.url)
        monkeypatch.setenv("VSTAR_LLM_MODEL", "mock")
        assert main(["synopsis", "p", "--llm-key-env", "MY_KEY"]) == 0
        assert server.headers[0]["Authorization"] == "Bearer secret"


BAD = [
    (["synopsis"], 2, "nothing to do"),
    (["synopsis", "p", "--llm-required"], 2, "needs an endpoint"),
    (["synopsis", "p", "--llm-url", "localhost"], 2, "starts with http"),
    (["synopsis", "p", "--llm-url", "http://x"], 2, "--llm-model"),
    (["synopsis", "p", "--llm-url", "http://x", "--llm-key-env", "NO_SUCH_KEY"], 2, "NO_SUCH_KEY"),
    (["synopsis", "p", "--state-count", "0"], 2, "1 to 512 states here, got 0"),
    (["synopsis", "--prompts", "nowhere"], 2, "cannot read the prompts"),
    (["synopsis", "p", "--out", "no/s.json"], 4, "there is no folder"),
    ([*TINY, "--embeddings", "nowhere"], 3, "not a whole bundle"),
    ([*TINY, "p", "--state-count", "5"], 2, "5 states need at least 5 frames"),
    ([*TINY, "--states", "a", "b", "--at", "0", "2"], 2, "ascend from 0 to 3"),
    ([*TINY, "--states", "a", "b", "--at", "0", "9"], 2, "ascend from 0 to 3"),
    ([*TINY, "--states", "a", "b", "--at", "soon"], 2, "a position is a frame"),
    ([*TINY, "--states", "a", "b", "--durations", "1", "2", "3"], 2, "3 durations for 2 states"),
    ([*TINY, "--states", "a", "b", "--negatives", "c"], 2, "1 negative prompts for 2 states"),
    (["embed", "p", "q", "--model", "mini", "--out", "b.safetensors"], 2, "one file holds one bundle"),
    (["embed", "p", "--model", "mini", "--batch", "0"], 2, "at least 1 text, got 0"),
    (["embed", "p", "--model", "mini", "--stored-as", "int8"], 2, "dtype must be"),
    (["embed", "p"], 3, "comes without weights"),
    (["embed", "p", "--model", "mini", "--out", "/dev/null/bundles"], 4, "cannot write /dev/null/bundles"),
    (["embed", "p", "--model", "mini", "--out", "no/b.safetensors"], 4, "there is no folder"),
]


@pytest.mark.parametrize(
    ("words", "code", "complaint"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_settings_get_a_sentence_and_a_code(here, capsys, words, code, complaint):
    assert main(words) == code
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.out == ""


def test_the_plan_is_printed_and_nothing_made(here, capsys):
    words = ["--states", "snow", "flowers", "--mode", "hold", "--durations", "1", "3", "--plan"]
    assert main([*TINY, *words]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "  1  snow",
        "  2  flowers",
        "frame  0         state 1",
        "frames 1-3       state 2",
    ]
    assert main([*TINY, *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["at"] == [0, 1]
    assert list(here.iterdir()) == []


def test_a_timeline_is_kept_in_the_file_and_made_again(here, capsys):
    words = ["--states", "snow", "rain", "--at", "0", "1.0", "--negatives", "sun", "night", "--mode", "ease"]
    assert main([*TINY, *words]) == 0
    capsys.readouterr()
    assert main(["inspect", "vstar.mp4"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert main([*command[1:], "--out", "again.mp4"]) == 0
    assert (here / "again.mp4").read_bytes() == (here / "vstar.mp4").read_bytes()


def test_a_bundle_makes_the_video_without_the_text_tower(here, capsys, monkeypatch):
    assert main(["embed", "--states", "snow", "rain", "--model", "mini", "--out", "b.safetensors"]) == 0
    assert "wrote b.safetensors: 2 states" in capsys.readouterr().out

    def no_tower(*_):
        raise AssertionError("the text tower was loaded")

    monkeypatch.setattr(loading, "load_text", no_tower)
    assert main([*TINY, "--embeddings", "b.safetensors"]) == 0
    capsys.readouterr()
    assert main(["inspect", "vstar.mp4"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert main([*command[1:], "--out", "again.mp4"]) == 0
    assert (here / "again.mp4").read_bytes() == (here / "vstar.mp4").read_bytes()
    assert main([*TINY, "--embeddings", "b.safetensors", "--negative", "x", "--force"]) == 2


def test_a_folder_of_bundles_is_resumed(here, capsys):
    (here / "p.txt").write_text("".join(f"a red ball turning blue {i}\n" for i in range(5)) + "day to night\n")
    words = ["embed", "--prompts", "p.txt", "--model", "mini", "--batch", "4"]
    assert main(words) == 0
    assert "6 new bundles, 0 were there" in capsys.readouterr().out
    index = here / "embeddings" / INDEX
    entries = [json.loads(line) for line in index.read_text().splitlines()]
    assert entries[-1]["prompt"] == "day to night"
    assert all(Embeddings.read(here / "embeddings" / entry["file"]).synopsis.prompt == entry["prompt"] for entry in entries)

    (here / "embeddings" / entries[0]["file"]).unlink()
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join(lines[:5]) + lines[5][:20])  # cut off while its last line was written
    assert main([*words, "snow"]) == 0
    assert "2 new bundles, 5 were there" in capsys.readouterr().out
    again = [json.loads(line) for line in index.read_text().splitlines()]
    assert {entry["file"] for entry in entries} < {entry["file"] for entry in again}
    assert len({entry["file"] for entry in again}) == len(again) == 7


def test_a_changed_setting_makes_bundles_of_its_own(here, capsys):
    words = ["embed", "snow", "--model", "mini"]
    for more in ([], ["--negative", "rain"], ["--stored-as", "float32"]):
        assert main([*words, *more]) == 0
        assert "1 new bundles, 0 were there" in capsys.readouterr().out
    assert main(words) == 0
    assert "0 new bundles, 1 were there" in capsys.readouterr().out
