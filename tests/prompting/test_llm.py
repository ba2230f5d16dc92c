"""Asking a chat endpoint for states: three forms of answer, every way to misbehave, one repair, and a cache."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.chat_server import ALL, ChatServer, broken, choice, cut_short, hang, raw, respond, trickle
from vstar_engine.errors import EndpointError, MissingLibrary
from vstar_engine.prompting.llm import LONGEST_ANSWER, MODES, Endpoint, Llm
from vstar_engine.prompting.llm_answer import parse_states
from vstar_engine.prompting.synopsis import LLM, OFFLINE, synopsize

STATES = ("a young boy", "a young man", "an old man")
GOOD = json.dumps({"states": STATES})
LIST = "1. a young boy\n2. a young man\n3. an old man"


def llm(server, cache=None, **settings):
    return Llm(Endpoint(server.url, "mock", **{"timeout": 5.0, **settings}), cache)


@pytest.mark.parametrize(
    ("forms", "answer", "asked"),
    [(ALL, GOOD, 1), (ALL[1:], GOOD, 2), (ALL[2:], LIST, 3)],
    ids=["json_schema", "json_object", "numbered list"],
)
def test_the_strictest_form_that_the_endpoint_knows_is_used_and_remembered(forms, answer, asked):
    with ChatServer(answer, forms=forms) as server:
        model = llm(server)
        assert model.states("a boy is getting old") == STATES
        assert len(server.requests) == asked
        assert model.states("a girl is getting old") == STATES
        assert len(server.requests) == asked + 1


def test_what_goes_over_the_wire():
    with ChatServer(GOOD) as server:
        llm(server, key="secret").states("a boy ü \ud800", 3)
    (request,) = server.requests
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert request["model"] == "mock"
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert request["messages"][1]["content"] == "a boy ü \ud800"
    assert "exactly 3" in request["messages"][0]["content"]
    assert '"a young boy" and "an old man"' in request["messages"][0]["content"]
    assert request["response_format"]["json_schema"]["schema"]["required"] == ["states"]


def test_without_a_key_none_is_sent():
    with ChatServer(GOOD) as server:
        llm(server).states("p")
    assert "Authorization" not in server.headers[0]


MENDED = {
    "one state": ('{"states": ["a"]}', "it has 1"),
    "no states": ('{"states": []}', "it has 0"),
    "500 states": (json.dumps({"states": [f"state {i}" for i in range(500)]}), "it has 500"),
    "empty": ("", "it has 0"),
    "no content": (raw(choice(None)), "it has 0"),
    "a blank state": ('{"states": ["a", " ", "b"]}', "number 2 has 0"),
    "a long state": (json.dumps({"states": ["a", "b" * 1000]}), "number 2 has 1000"),
    "repeated": ('{"states": ["a boy", "A boy"]}', "1 and 2 are the same"),
    "truncated": (cut_short('{"states": ["a young boy", "an o'), "cut short"),
    "truncated list": (cut_short("1. a young boy\n2. an o"), "cut short"),
    "numbers": ('{"states": [1, 2]}', "it has 0"),
    "nested": ("[" * 100_000, "it has 0"),
}


@pytest.mark.parametrize(("bad", "complaint"), MENDED.values(), ids=MENDED.keys())
def test_a_bad_answer_is_asked_for_again_once_saying_why(bad, complaint):
    with ChatServer(bad, GOOD) as server:
        assert llm(server).states("p") == STATES
    first, second = server.requests
    assert second["messages"][:2] == first["messages"]
    assert complaint in second["messages"][-1]["content"]


def test_a_wrong_count_is_asked_for_again():
    with ChatServer(GOOD, '{"states": ["a", "b"]}') as server:
        assert llm(server).states("p", 2) == ("a", "b")
    assert "2 states were asked for, it has 3" in server.requests[1]["messages"][-1]["content"]


FAILURES = {
    "HTTP 500": (500, "HTTP 500"),
    "HTTP 404": (404, "HTTP 404"),
    "unauthorised": (401, "refuses the key"),
    "hang": (hang, "cannot ask"),
    "trickle": (trickle, "within 0.3 s"),
    "huge": (raw(b" " * (LONGEST_ANSWER + 1)), f"more than {LONGEST_ANSWER} bytes"),
    "cut off": (broken, "cannot ask"),
    "not JSON": (raw(b"<html>"), "not answer as a chat endpoint"),
    "another JSON": (raw(b'{"choices": []}'), "not answer as a chat endpoint"),
    "deep JSON": (raw(b"[" * 100_000), "not answer as a chat endpoint"),
    "redirect": (lambda handler: respond(handler, 302, b""), "HTTP 302"),
    "always prose": ("What a lovely idea!", "no usable synopsis"),
}


@pytest.mark.parametrize(("answer", "complaint"), FAILURES.values(), ids=FAILURES.keys())
def test_failures_are_one_sentence_and_the_offline_rules_serve(answer, complaint, caplog):
    with ChatServer(answer) as server:
        model = llm(server, timeout=0.3)
        with pytest.raises(EndpointError, match=complaint) as failure:
            synopsize("a red ball turning blue", llm=model, required=True)
        assert "\n" not in str(failure.value)
        found = synopsize("a red ball turning blue", llm=model)
    assert found.states == ("a red ball", "a blue ball")
    assert found.source == OFFLINE
    assert "the offline rules serve instead" in caplog.text
    assert len(server.requests) <= 2 * len(MODES)


def test_an_endpoint_that_is_not_there():
    with ChatServer(GOOD) as server:
        pass
    with pytest.raises(EndpointError, match="cannot ask"):
        llm(server).states("p")


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        f"Sure! Here you go:\n```json\n{GOOD}\n```\nAnything else?",
        f"[note] {GOOD}",
        f"<think>first 1. a baby\n2. a crib</think>{GOOD}",
        json.dumps(STATES),
        json.dumps({"title": "age", "subprompts": STATES}),
        LIST,
        "The states:\n\n1) a young boy\n2) a young man\n3) an old man\n\nDone.",
        "- a young boy\n- **a young man**\n- an old man",
        'State 1: "a young boy"\nState 2: "a young man"\nState 3: "an old man"',
    ],
    ids=["JSON", "fenced", "brackets before", "thought", "list", "another key", "numbered", "prose", "dashes", "states"],
)
def test_answers_are_found_in_what_surrounds_them(answer):
    assert parse_states(answer) == STATES


def test_the_same_question_costs_one_call(tmp_path):
    with ChatServer(GOOD) as server:
        for _ in range(2):
            assert synopsize("p", llm=llm(server, tmp_path / "kept", key="secret")).source == LLM
        assert len(server.requests) == 1
        llm(server, tmp_path / "kept").states("p", 3)
        llm(server, tmp_path / "kept").states("q")
        assert len(server.requests) == 3
        for kept in (tmp_path / "kept").iterdir():
            assert "secret" not in kept.read_text()
            kept.write_text("{")
        assert llm(server, tmp_path / "kept").states("p") == STATES
        assert len(server.requests) == 4


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with ChatServer(GOOD) as server:
        assert llm(server, tmp_path / "file").states("p") == STATES
    assert "is not kept" in caplog.text


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"url": "localhost:8000", "model": "m"}, "starts with http"),
        ({"url": "http://x", "model": ""}, "--llm-model"),
        ({"url": "http://x", "model": "m", "timeout": 0.0}, "above 0, got 0.0"),
        ({"url": "http://x", "model": "m", "timeout": float("nan")}, "above 0, got nan"),
    ],
    ids=str,
)
def test_endpoints_that_make_no_sense(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        Endpoint(**settings)


def test_without_httpx_only_a_language_model_is_missed(modules):
    modules({"httpx": None})
    with pytest.raises(MissingLibrary, match="httpx"):
        Llm(Endpoint("http://x", "m"))
    assert synopsize("day to night").source == OFFLINE


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_what_an_endpoint_says_of_a_prompt_is_logged_at_debug_alone(level, caplog):
    """An error may repeat the request that it is about."""
    caplog.set_level(level, logger="vstar_engine")

    def echo(handler):
        respond(handler, 400, b'{"error": {"message": "cannot read: a very secret prompt"}}')

    with ChatServer(echo) as server:
        assert synopsize("a very secret prompt", llm=llm(server)).states == ("a very secret prompt",)
    assert "answered HTTP 400" in caplog.text
    assert ("very secret" in caplog.text) == (level == "DEBUG")


ANSWERS = {
    "the closing tag alone": 'Maybe ["draft one", "draft two"] would do.\n</think>\n' + GOOD,
    "another closing tag": f'["draft one", "draft two"]</reasoning>{GOOD}',
    "a list before the states": json.dumps({"reasoning": ["it is cold", "it gets warm"], "states": STATES}),
    "drafts without tags": f'First {{"states": ["a", "b"]}}, better {GOOD}',
    "a trailing comma": '{"states": ["a young boy", "a young man", "an old man",]}',
    "objects": json.dumps({"states": [{"description": state} for state in STATES]}),
    "numbered keys": json.dumps({"states": {str(i): state for i, state in enumerate(STATES, 1)}}),
    "full-width numbers": "\n".join(f"{chr(0xFF10 + i)}\uff0e{state}" for i, state in enumerate(STATES, 1)),
    "Chinese numbers": "\n".join(f"{i}、{state}" for i, state in enumerate(STATES, 1)),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_the_states_are_taken_and_not_the_reasoning(case):
    assert parse_states(ANSWERS[case]) == STATES


def test_of_several_lists_without_the_name_none_is_taken():
    assert parse_states(json.dumps({"reasoning": ["a", "b"], "answer": ["c", "d"]})) == ()


def busy(status, wait):
    def say(handler):
        handler.send_response(status)
        handler.send_header("Retry-After", wait)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return say


def test_a_busy_endpoint_is_waited_for_and_keeps_its_form():
    with ChatServer(busy(429, "0"), busy(503, "0"), GOOD) as server:
        assert llm(server).states("p") == STATES
    assert [request["response_format"]["type"] for request in server.requests] == ["json_schema"] * 3


def test_a_wait_beyond_the_timeout_is_not_begun():
    with ChatServer(busy(429, "3600")) as server, pytest.raises(EndpointError, match="HTTP 429"):
        llm(server).states("p")
    assert len(server.requests) == 1


def test_first_requests_at_once_find_the_form_each():
    with ChatServer(LIST, forms=ALL[2:]) as server, ThreadPoolExecutor(8) as pool:
        model = llm(server)
        assert list(pool.map(model.states, [f"prompt {i}" for i in range(8)])) == [STATES] * 8


def test_a_key_is_cleaned_and_never_shown(monkeypatch):
    with ChatServer(GOOD) as server:
        assert llm(server, key="sk-secret\n").states("p") == STATES
        assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    with pytest.raises(ValueError, match="the endpoint's key holds") as refused:
        Endpoint("http://127.0.0.1/v1", "m", "sk-secret\nsk-other")
    assert "sk-" not in str(refused.value)
    assert "sk-" not in repr(Endpoint("http://127.0.0.1/v1", "m", "sk-secret"))
    with pytest.raises(EndpointError) as failed:
        Llm(Endpoint("http://user:sk-pass@127.0.0.1:9/v1", "m")).states("p")
    assert "sk-" not in str(failed.value)
