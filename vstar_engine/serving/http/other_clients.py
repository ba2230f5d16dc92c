"""What clients of other servers send, spelled as this API's where it can mean one thing; else an error names what would do."""

import json
import re
from typing import Any

from vstar_engine.serving.errors import invalid

from .field_values import as_whole

LISTS, OBJECTS = ("synopsis", "subprompts"), ("synopsis", "subprompts", "tar", "metadata")
INDEXED = re.compile(rf"({'|'.join(LISTS)})\[([0-9]{{1,2}})\](.*)")
SIZE = re.compile(r"\s*([0-9]{1,5})\s*[xX*\u00d7]\s*([0-9]{1,5})\s*")
SECONDS = re.compile(r"\s*0*([0-9]{1,3})(?:\.0*)?\s*(?:s|sec|seconds)?\s*")
SEED_RANGE = 2**32
# other servers' word for a seed that is drawn
DRAWN = -1
# a text that may be empty; other fields of a form are left out when they are
MAY_BE_EMPTY = ("prompt", *LISTS)


def our_form(fields: list[tuple[str, str]]) -> list[tuple[str, Any]]:
    """Returns a form's fields as ours: lists with [] instead of numbers or repeated names, JSON parsed, empty ones left out."""
    plain = [(name, value) for name, value in fields if value.strip() or name.partition("[")[0] in MAY_BE_EMPTY]
    indexed = sorted((match for name, _ in plain if (match := INDEXED.fullmatch(name))), key=lambda match: int(match[2]))
    for name in LISTS:
        numbers = sorted({int(match[2]) for match in indexed if match[1] == name})
        if numbers != list(range(len(numbers))):
            said = f"{name} is numbered from 0 without gaps, got {', '.join(map(str, numbers))}"
            raise invalid(said, name, "invalid_body")
    values = dict(plain)
    in_order = [(f"{match[1]}[]{match[3]}", values[match[0]]) for match in indexed]
    rest = [(name, value) for name, value in plain if not INDEXED.fullmatch(name)]
    # with brackets elsewhere, one value more would be a guess; that is refused as mixed
    bracketed = {name.partition("[")[0] for name, _ in plain if "[" in name}
    return [*((name, value) if name in bracketed else _spelled(name, value) for name, value in rest), *in_order]


def _spelled(name: str, value: str) -> tuple[str, Any]:
    """Returns a field as ours: JSON in it parsed, one text of a list appended to it."""
    if name in OBJECTS and value.lstrip().startswith(("{", "[")):
        try:
            return name, json.loads(value)
        except (ValueError, RecursionError) as error:
            raise invalid(f"{name} holds JSON that cannot be read: {error}", name, "invalid_body") from error
    return (f"{name}[]", value) if name in LISTS else (name, value)


def our_body(content: dict[str, Any]) -> dict[str, Any]:
    """Returns a body whose size, seconds and seed are spelled as ours."""
    found = dict(content)
    sides = [as_whole(found.get(name)) for name in ("width", "height")]
    if all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
        del found["width"], found["height"]
        said = f"{sides[0]}x{sides[1]}"
        if found.get("size") not in (None, said):
            raise invalid(f"size is {found['size']}, and width and height say {said}: give one of them", "size")
        found["size"] = said
    if isinstance(found.get("size"), str):
        found["size"] = _size(found["size"])
    if "seconds" in found:
        found["seconds"] = _seconds(found["seconds"])
    if "seed" in found:
        found["seed"] = _seed(found["seed"])
    return found


def _size(text: str) -> str | None:
    if text.strip().lower() in ("", "auto"):
        return None
    if match := SIZE.fullmatch(text):
        return f"{int(match[1])}x{int(match[2])}"
    raise invalid(f"size is WIDTHxHEIGHT in pixels, such as 128x96, got {text[:40]!r}", "size")


def _seconds(value: Any) -> Any:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and (match := SECONDS.fullmatch(value)):
        return int(match[1])
    raise invalid(f"""seconds is a whole number, such as 4 or "4", got {json.dumps(value)[:40]}""", "seconds")


def _seed(value: Any) -> Any:
    value = as_whole(value)
    if isinstance(value, int) and not isinstance(value, bool) and not DRAWN <= value < SEED_RANGE:
        raise invalid(f"seed is 0 to {SEED_RANGE - 1}, or -1 for one that is drawn, got {value}", "seed")
    return value


def our_path(path: str) -> str:
    """Returns a request's path without doubled slashes in front and without one at its end."""
    return "/" + path.strip("/") if path != "/" else path
