"""Synopses in files: what is written reads back, long files are streamed, bad ones are told apart."""

import json
from itertools import islice

import pytest

from vstar_engine.prompting.llm import MOST
from vstar_engine.prompting.synopsis import OFFLINE, PROMPT, Synopsis, read_prompts, read_synopses, synopsize, thin


@pytest.mark.parametrize(
    "synopsis",
    [
        Synopsis("p", ("a", "b"), "llm"),
        Synopsis("p", ("a", "b"), at=(0, 0.5)),
        Synopsis("p", ("a", "b"), durations=(1.0, 2.0), negatives=("x", "")),
        Synopsis("p", ("a", "b", "c"), durations=(1.0, 2.0)),
        Synopsis("ü 🚀", ('"', "\n")),
    ],
    ids=["plain", "positions", "durations and negatives", "no last duration", "odd text"],
)
def test_what_is_written_reads_back(tmp_path, synopsis):
    (tmp_path / "s.json").write_text(json.dumps([synopsis.entry()]))
    assert read_synopses(tmp_path / "s.json") == [synopsis]
    (tmp_path / "s.jsonl").write_text(f"{json.dumps(synopsis.entry())}\n" * 2)
    assert read_synopses(tmp_path / "s.jsonl") == [synopsis] * 2


@pytest.mark.parametrize(
    ("states", "complaint"),
    [
        ([{"at": 1}], "subprompts"),
        ([{"text": "a", "at": 0}, "b"], "at stands at 1 of 2 states"),
        ([{"text": "a"}, {"text": "b", "duration": 1}], "duration stands at 1 of 2"),
        ([{"text": "a", "at": True}], "frame such as 12"),
        ([{"text": "a", "at": "soon"}], "a position is a frame"),
        ([{"text": "a", "duration": "long"}], "duration is a number"),
        ([{"text": "a", "duration": "nan"}], "duration is a number"),
        ([{"text": "a", "colour": 1}], "got colour"),
    ],
    ids=str,
)
def test_bad_states(tmp_path, states, complaint):
    (tmp_path / "s.json").write_text(json.dumps({"prompt": "p", "subprompts": states}))
    with pytest.raises(ValueError, match=complaint):
        read_synopses(tmp_path / "s.json")


def test_prompts_and_synopses_line_by_line(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text('day to night\n\n  snow \n{"prompt": "p", "subprompts": ["a"]}\n')
    assert list(read_prompts(file)) == ["day to night", "snow", Synopsis("p", ("a",))]
    file.write_text('snow\n{"broken\n')
    with pytest.raises(ValueError, match="line 2 looks like JSON"):
        list(read_prompts(file))
    file.write_bytes(b"snow\n\xff\n")
    with pytest.raises(ValueError, match="cannot read the prompts"):
        list(read_prompts(file))
    with pytest.raises(ValueError, match="cannot read the prompts"):
        list(read_prompts(tmp_path / "nowhere"))


def test_a_long_file_is_not_read_ahead(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    writer = os.open(tmp_path / "pipe", os.O_RDWR)
    os.write(writer, b"snow\n" * 5000)
    assert len(list(islice(read_prompts(tmp_path / "pipe"), 1000))) == 1000
    os.close(writer)


def test_states_are_thinned_evenly():
    assert thin("abcdefghi", 5) == ("a", "c", "e", "g", "i")
    assert thin("abc", 2) == ("a", "c")
    assert thin("abc", 3) == tuple("abc")


@pytest.mark.parametrize(("count", "most", "states"), [(None, MOST, 5), (None, 3, 3), (2, MOST, 2), (1, MOST, 1), (None, 1, 1)])
def test_offline_counts(count, most, states):
    found = synopsize("a landscape from winter to spring", count, most)
    assert len(found.states) == states
    assert found.source == (PROMPT if states == 1 else OFFLINE)


def test_more_states_than_the_rules_know_are_missed_aloud(caplog):
    assert len(synopsize("a red ball turning blue", 4).states) == 2
    assert "know 2 states for this prompt, not 4" in caplog.text


def test_no_states_are_refused():
    with pytest.raises(ValueError, match="at least 1 state, got 0"):
        synopsize("p", 0)


def put(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def test_null_is_not_given(tmp_path):
    states = [{"text": text, "at": None, "duration": None, "negative": None} for text in ("snow", "thaw")]
    content = json.dumps({"prompt": None, "negative": None, "synopsis_source": None, "subprompts": states})
    assert read_synopses(put(tmp_path, "s.json", content)) == [Synopsis("snow", ("snow", "thaw"))]


def test_numbers_that_are_text(tmp_path):
    states = [{"text": "snow", "duration": "2"}, {"text": "thaw", "duration": " 1.5 "}]
    (found,) = read_synopses(put(tmp_path, "s.json", json.dumps({"prompt": "p", "subprompts": states})))
    assert found.durations == (2.0, 1.5)


@pytest.mark.parametrize("text", ["[winter:spring:0.5] a hill\nsnow", "{red|blue} flowers\nsnow", "[1990] a street\n[x]\n"])
def test_a_prompt_may_begin_with_a_bracket(tmp_path, text):
    assert [synopsis.states for synopsis in read_synopses(put(tmp_path, "s.txt", text))] == [tuple(text.strip().split("\n"))]
    assert list(read_prompts(put(tmp_path, "p.txt", text))) == text.strip().split("\n")


@pytest.mark.parametrize("mark", ["\u2028", "\x0b", "\x0c", "\x85", "\u2029"])
def test_a_line_ends_at_a_newline_alone_in_both_readers(tmp_path, mark):
    file = put(tmp_path, "s.txt", f"deep snow,{mark}bare trees\r\nflowers\n")
    wanted = [f"deep snow,{mark}bare trees", "flowers"]
    assert list(read_prompts(file)) == wanted
    assert read_synopses(file)[0].states == tuple(wanted)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_a_byte_order_mark_says_the_encoding(tmp_path, encoding):
    content = json.dumps({"prompt": "ü", "subprompts": ["雪", "花"]}, ensure_ascii=False)
    assert read_synopses(put(tmp_path, "s.json", content.encode(encoding)))[0].states == ("雪", "花")
    assert list(read_prompts(put(tmp_path, "p.txt", "雪\n花".encode(encoding)))) == ["雪", "花"]


@pytest.mark.parametrize("name", ["s.JSONL", "s.ndjson"])
def test_endings_of_an_object_a_line(tmp_path, name):
    line = json.dumps({"prompt": "p", "subprompts": ["a"]}) + "\n"
    assert read_synopses(put(tmp_path, name, line * 2)) == [Synopsis("p", ("a",))] * 2


def test_a_negative_of_the_whole_video(tmp_path):
    content = {"prompt": "p", "negative": "people", "subprompts": ["a", {"text": "b", "negative": "cars"}]}
    assert read_synopses(put(tmp_path, "s.json", json.dumps(content)))[0].negatives == ("people", "cars")


WRONG = {
    "a list for the prompt": ('{"prompt": ["p"], "subprompts": ["a"]}', 'prompt is text, got ."p".'),
    "false for a negative": ('{"subprompts": [{"text": "a", "negative": false}]}', "negative is text, got false"),
    "a number for the source": ('{"synopsis_source": 3, "subprompts": ["a"]}', "synopsis_source is text, got 3"),
    "an unknown key at the top": (
        '{"prompt": "p", "sead": 3, "subprompts": ["a"]}',
        "has prompt, negative and subprompts, got sead",
    ),
    "the original's name": ('{"prompt": "p", "attribute_list": ["a"]}', "attribute_list is subprompts here"),
    "a trailing comma": ('{"prompt": "p", "subprompts": ["a",]}', "take out the comma before the closing bracket"),
    "two objects": ('{"subprompts": ["a"]}\n{"subprompts": ["b"]}', "one a line belong into a .jsonl file"),
    "NaN": ('{"subprompts": [{"text": "a", "at": NaN}]}', "NaN is no number of JSON"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_no_synopsis_is_told_what_would_do(tmp_path, fault):
    content, said = WRONG[fault]
    with pytest.raises(ValueError, match=said):
        read_synopses(put(tmp_path, "s.json", content))


def test_a_share_that_javascript_wrote_as_1_is_remarked_on(tmp_path, caplog):
    states = [{"text": "a", "at": 0}, {"text": "b", "at": 1}]
    read_synopses(put(tmp_path, "s.json", json.dumps({"prompt": "p", "subprompts": states})))
    assert 'at 1 is frame 1, the second one; for the end of the video write "100%"' in caplog.text
