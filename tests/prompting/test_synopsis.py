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
        ([{"text": "a", "duration": "1"}], "duration is a number"),
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
    file.write_text("snow\n{broken\n")
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
