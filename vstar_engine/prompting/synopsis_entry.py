"""A synopsis as a JSON object, checked: what a file holds of a video and its states."""

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from vstar_engine.config.timeline import Position, parse_position

log = logging.getLogger(__name__)

GIVEN = "given"  # where a synopsis came from that says nothing else
TOP = ("prompt", "negative", "subprompts", "synopsis_source")
STATE = ("text", "at", "duration", "negative")
# what others call these fields
CALLED_HERE = {
    "attribute_list": "subprompts",
    "states": "subprompts",
    "synopsis": "subprompts",
    "negative_prompt": "negative",
    "prompt": "text",
}


def fields_of(entry: object, where: str) -> dict[str, Any]:
    """Returns a synopsis's fields from {"prompt": ..., "negative": ..., "subprompts": [...]}; ValueError says what is wrong.

    null stands for "not given". A negative of the whole video holds for the states without one of their own.
    """
    if not isinstance(entry, dict):
        raise _not_one(entry, where)
    top = _given(entry, TOP, where, "a synopsis has prompt, negative and subprompts")
    subprompts = top.get("subprompts")
    if not isinstance(subprompts, list):
        raise _not_one(entry, where)
    if not subprompts:
        raise ValueError(f"{where}: the synopsis of {_text(top, 'prompt', where)[:80]!r} has no subprompts")
    wanted = "a state has text, at, duration and negative"
    states = [{"text": state} if isinstance(state, str) else state for state in subprompts]
    if not all(isinstance(state, dict) and isinstance(state.get("text"), str) for state in states):
        raise _not_one(entry, where)
    states = [_given(state, STATE, where, wanted) for state in states]
    negative = _text(top, "negative", where)
    negatives = tuple(_text(state, "negative", where) or negative for state in states)
    at = tuple(_position(value, where) for value in _column(states, "at", where))
    _remark_on_shares(at, where)
    return {
        "prompt": _text(top, "prompt", where) if "prompt" in top else states[0]["text"],
        "states": tuple(state["text"] for state in states),
        "source": _text(top, "synopsis_source", where) or GIVEN,
        "at": at,
        "durations": tuple(_duration(value, where) for value in _column(states, "duration", where)),
        "negatives": negatives if any(negatives) else (),
    }


def _given(entry: Mapping[str, Any], known: tuple[str, ...], where: str, wanted: str) -> dict[str, Any]:
    """Returns the fields that are not null; ValueError for unknown ones, which says what they are called here."""
    unknown = sorted(str(name) for name in entry if name not in known)
    if unknown:
        called = [f"{name} is {CALLED_HERE[name]} here" for name in unknown if CALLED_HERE.get(name) in known]
        told = f" ({', '.join(called)})" if called else ""
        raise ValueError(f"{where}: {wanted}, got {', '.join(unknown)}{told}")
    return {name: value for name, value in entry.items() if value is not None}


def _text(entry: Mapping[str, Any], name: str, where: str) -> str:
    value = entry.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is text, got {json.dumps(value)[:80]}")
    return value


def _not_one(entry: object, where: str) -> ValueError:
    return ValueError(f'{where}: a synopsis is {{"prompt": "...", "subprompts": ["...", ...]}}, got {json.dumps(entry)[:80]}')


def _column(states: list[dict[str, Any]], name: str, where: str) -> list[Any]:
    """Returns every state's value of a name; the last state may lack its duration."""
    values = [state[name] for state in states if name in state]
    whole = len(values) in (0, len(states))
    if not whole and not (name == "duration" and len(values) == len(states) - 1 and name not in states[-1]):
        raise ValueError(f"{where}: {name} stands at {len(values)} of {len(states)} states; give it to all or to none")
    return values


def _position(value: object, where: str) -> Position:
    if isinstance(value, str):
        return parse_position(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(
            f"{where}: a state's at is a frame such as 12, a share such as 0.5 or '50%', or a time such as '12s', got {value!r}"
        )
    return value


def _remark_on_shares(at: tuple[Position, ...], where: str) -> None:
    """Warns of a 1 among shares: JavaScript writes 1.0, the end of the video, as 1, which is a frame."""
    if (
        len(at) > 1
        and isinstance(at[-1], int)
        and at[-1] == 1
        and all(not isinstance(value, str) and 0 <= value <= 1 for value in at)
    ):
        log.warning('%s: at 1 is frame 1, the second one; for the end of the video write "100%%"', where)


def _duration(value: object, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where}: a state's duration is a number, got {value!r}")
    return number
