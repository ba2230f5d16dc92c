"""The states in a chat model's answer, whatever stands around them."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

MOST_STARTS = 64  # brackets in an answer that are tried as the start of its JSON
# after a number: ASCII, or 、 and the full-width full stop, bracket and colon
NUMBERED = re.compile(r"^\s*(?:[-*•]\s*|(?:state\s*)?\d+\s*[.):\u3001\uff0e\uff09\uff1a-]\s*)(.+)$", re.IGNORECASE)
# where a model's reasoning begins and ends; answers may lack the beginning
WORDS = "think|thinking|thought|thoughts|reasoning|reflection"
THOUGHT_ENDS = re.compile(rf"</(?:{WORDS})>|\[/think\]|◁/think▷|<\|channel\|>final<\|message\|>", re.IGNORECASE)
THOUGHT_BEGINS = re.compile(rf"<(?:{WORDS})>|\[think\]|◁think▷", re.IGNORECASE)
TRAILING_COMMA = re.compile(r",(\s*[\]}])")
# what a state is called where it is an object
TEXTS = ("text", "state", "description", "prompt", "sentence", "caption")


def parse_states(answer: str) -> tuple[str, ...]:
    """Finds the states in an answer: in JSON, with or without prose around it, else in a numbered or dashed list."""
    *_, answer = THOUGHT_ENDS.split(answer)
    answer = THOUGHT_BEGINS.split(answer)[0]
    found = _in_json(answer) or [match[1] for line in answer.split("\n") if (match := NUMBERED.match(line))]
    return tuple(" ".join(state.strip().strip('"“”*').split()).encode(errors="replace").decode() for state in found)


def _in_json(answer: str) -> list[str]:
    """Returns the last list under the key `states`; without one the last list that stands alone."""
    values = list(_values(answer)) or list(_values(TRAILING_COMMA.sub(r"\1", answer)))
    named = [states for value in values if isinstance(value, dict) and (states := _texts(value.get("states")))]
    if named:
        return named[-1]
    alone = []
    for value in values:
        lists = [states for item in (value.values() if isinstance(value, dict) else [value]) if (states := _texts(item))]
        # of several lists nobody says which is meant
        alone += lists if len(lists) == 1 else []
        if not lists and isinstance(value, dict) and (states := _texts(value)):
            alone.append(states)
    return alone[-1] if alone else []


def _values(answer: str) -> Iterator[Any]:
    """Yields what stands in an answer as JSON, one after the other."""
    decoder, end = json.JSONDecoder(), 0
    for start in islice(re.finditer(r"[{\[]", answer), MOST_STARTS):
        if start.start() < end:
            continue
        try:
            value, end = decoder.raw_decode(answer, start.start())
        except (ValueError, RecursionError):
            continue
        yield value


def _texts(value: Any) -> list[str]:
    """Returns a list's texts: of strings, of objects with one text each, or of an object whose keys are numbers."""
    if isinstance(value, dict):
        value = (
            list(value.values())
            if value and all(re.fullmatch(r"(state\s*)?\d+", key, re.IGNORECASE) for key in value)
            else None
        )
    if not isinstance(value, list) or not value:
        return []
    texts = [_text(item) for item in value]
    return [text for text in texts if text is not None] if None not in texts else []


def _text(item: Any) -> str | None:
    if isinstance(item, dict):
        item = next((item[name] for name in TEXTS if isinstance(item.get(name), str)), None)
    return item if isinstance(item, str) else None
