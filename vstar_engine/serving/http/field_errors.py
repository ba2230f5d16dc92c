"""What is wrong with a body, in a sentence that names the field, what it is and what was sent."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .schema import BUNDLE, LEVEL, NO_NUL, SIZE, State, TarSettings, VideoSettings
from .unknown_fields import unknown_field

# what a value of the wrong kind should have been, by pydantic's names
KINDS = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "an object"),
    "string_type": "text",
    "list_type": "a list",
}
# what a field is that may be several things
FIELDS = {
    "size": "WIDTHxHEIGHT in pixels, such as 128x96",
    "tar": 'a preset such as "64D1_32D8", "none", or an object with preset, sigma, strength and until',
    "synopsis": "a list of texts, or of objects with text, at, duration and negative",
    "subprompts": "a list of texts, or of objects with text, at, duration and negative",
    "at": 'a frame such as 12, or a share of the clip such as 0.5 or "50%"',
    "sigma": 'a number, or an object of numbers by UNet level such as {"0": 1.0}',
    "until": 'a step such as 13, or a share of the steps such as "56%"',
}
PATTERNS = {
    NO_NUL: "is text without NUL",
    SIZE: f"is {FIELDS['size']}",
    LEVEL: "is a UNet level, 0 to 9",
    BUNDLE: "is an id of letters, digits, dots, dashes and underscores",
}
LIMITS = {
    "greater_than_equal": ("ge", "is at least"),
    "greater_than": ("gt", "is above"),
    "less_than_equal": ("le", "is at most"),
    "less_than": ("lt", "is below"),
}
LONGEST_SHOWN = 40


def sentence(errors: Sequence[Mapping[str, Any]], content: Any) -> tuple[str, str | None, bool]:
    """Returns what is wrong with the first wrong field of a body, that field, and whether there is no such field."""
    paths = [_path(error, content) for error in errors]
    field = paths[0][:1]
    own = [(path, error) for path, error in zip(paths, errors, strict=True) if path[:1] == field]
    strange = [one for one in own if one[1]["type"] == "extra_forbidden"]
    # of a field that may be several things, what is wrong farthest inside is what was meant
    path, error = (strange or sorted(own, key=lambda one: -len(one[0])))[0]
    param = str(field[0]) if field else None
    if strange:
        return f"{spelled(path)}: {_unknown(path)}", param, True
    kinds = [KINDS.get(other["type"]) for at, other in own if at == path]
    if not path:
        return _plain(error), param, False
    name = path[-1]
    if None not in kinds and (several := FIELDS.get(str(name)) or " or ".join(dict.fromkeys(filter(None, kinds)))):
        return f"{spelled(path)} is {several}, got {shown(error['input'])}", param, False
    error = next(other for at, other in own if at == path and other["type"] not in KINDS)
    return f"{spelled(path)}{_wrong(error, str(name))}", param, False


def _path(error: Mapping[str, Any], content: Any) -> tuple[int | str, ...]:
    """Returns the place of an error in a body, without pydantic's names of the types that were tried there."""
    found: list[int | str] = []
    for part in error["loc"]:
        if (isinstance(content, dict) and part in content) or (isinstance(content, list) and isinstance(part, int)):
            found.append(part)
            content = content[part]
    return (*found, error["loc"][-1]) if error["type"] == "missing" else tuple(found)


def spelled(path: Sequence[int | str]) -> str:
    """Returns a place as JavaScript writes it: synopsis[1].text."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in path).removeprefix(".")


def shown(value: Any) -> str:
    """Returns a value as JSON, its beginning where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _unknown(path: Sequence[int | str]) -> str:
    of_state = len(path) > 2
    kind = VideoSettings if len(path) == 1 else State if of_state else TarSettings
    return unknown_field(
        str(path[-1]), (*kind.model_fields, "prompt") if len(path) == 1 else tuple(kind.model_fields), of_state
    )


def _plain(error: Mapping[str, Any]) -> str:
    return str(error["msg"]).removeprefix("Value error, ")


def _wrong(error: Mapping[str, Any], name: str) -> str:
    """Returns what is wrong with the value of a field, to follow its name."""
    kind, ctx, got = error["type"], error.get("ctx", {}), shown(error["input"])
    if name == "n":
        return f" is 1, since a request makes one video, got {got}"
    if kind in LIMITS:
        key, words = LIMITS[kind]
        return f" {words} {ctx[key]:.10g}, got {got}"
    if kind == "missing":
        return " is missing"
    if kind == "literal_error":
        return f" is {ctx['expected']}, got {got}"
    if kind == "string_pattern_mismatch":
        return f" {PATTERNS.get(ctx['pattern'], f'is {FIELDS.get(name)}')}, got {got}"
    if kind in ("string_too_short", "too_short"):
        return " is empty"
    if kind == "string_too_long":
        return f" has at most {ctx['max_length']} letters, got {len(error['input'])}"
    if kind == "too_long":
        return f" has at most {ctx['max_length']} entries, got {len(error['input'])}"
    return f": {_plain(error)}"
