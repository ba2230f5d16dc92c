"""Values of a body's fields in the spellings of JSON and of forms: a whole number may come as 7, 7.0, "7" or "7.0"."""

import math
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

WHOLE = r"^\s*[+-]?[0-9]{1,18}(\.0*)?\s*$"
REAL = r"^\s*[+-]?([0-9]{1,18}(\.[0-9]*)?|\.[0-9]{1,18})([eE][+-]?[0-9]{1,3})?\s*$"
TRUTHS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def in_any_case(words: Iterable[str]) -> str:
    """Returns the pattern of one of several words, in capitals or not."""
    return rf"^\s*({'|'.join(''.join(f'[{x.lower()}{x.upper()}]' for x in word) for word in words)})\s*$"


def as_whole(value: Any) -> Any:
    """Returns the whole number that a value spells, or the value itself where it spells none."""
    if isinstance(value, str) and re.match(WHOLE, value):
        return int(value.strip().partition(".")[0])
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_real(value: Any) -> Any:
    """Returns the finite number that a text spells, or the value itself."""
    if isinstance(value, str) and re.match(REAL, value) and math.isfinite(number := float(value)):
        return number
    return value


def as_truth(value: Any) -> Any:
    """Returns what a text such as "true" or a 0 or 1 says, or the value itself."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return value
    return TRUTHS.get(str(value).strip().lower(), value)


def as_note(value: Any) -> Any:
    """Returns the text of a number, or the value itself."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def as_list(value: Any) -> Any:
    """Returns a list of a lone text of one line, or the value itself."""
    return [value] if isinstance(value, str) and "\n" not in value else value


def as_preset(value: Any) -> Any:
    """Returns the preset without TAR for false, or the value itself."""
    return "none" if value is False else value


def choice(choices: tuple[str, ...]) -> Any:
    """Returns the type of one of several words, taken in any case."""
    known = {word.lower(): word for word in choices}
    words: Any = Literal[choices]

    def named(value: Any) -> Any:
        return known.get(value.strip().lower(), value) if isinstance(value, str) else value

    spelled = Annotated[str, Field(pattern=in_any_case(choices))]
    return Annotated[words, BeforeValidator(named, json_schema_input_type=words | spelled)]


def number(kind: Any, **limits: Any) -> Any:
    """Returns the type of a number within limits, int or float, that may be spelled as text."""
    limited = Annotated[kind, Field(**limits)]
    spelled = Annotated[str, Field(pattern=WHOLE if kind is int else REAL)]
    return Annotated[limited, BeforeValidator(as_whole if kind is int else as_real, json_schema_input_type=limited | spelled)]


# 0 and 1 are numbers for JSON
Truth = Annotated[
    bool,
    BeforeValidator(
        as_truth,
        json_schema_input_type=bool | Annotated[int, Field(ge=0, le=1)] | Annotated[str, Field(pattern=in_any_case(TRUTHS))],
    ),
]
