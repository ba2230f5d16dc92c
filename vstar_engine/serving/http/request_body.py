"""Reads request bodies: JSON, or forms with bracketed names for lists and objects, as OpenAI's clients send them."""

import json
import math
import re
from itertools import pairwise
from typing import Any

from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request

from vstar_engine.serving.errors import ApiError, invalid

from .other_clients import our_body, our_form

DEEPEST = 32
MOST_FIELDS = 256
JSON_TYPE, FORM_TYPES = "application/json", ("multipart/form-data", "application/x-www-form-urlencoded")
PART = re.compile(r"\[([^\[\]]*)\]")


async def read_body(request: Request) -> tuple[dict[str, Any], bool]:
    """Returns the object in a body, and whether it is a form, in which numbers are text; ApiError for any other body."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "unsupported_encoding", "compressed bodies are not supported; leave out Content-Encoding")
    kind = request.headers.get("content-type", JSON_TYPE).partition(";")[0].strip().lower()
    if kind in FORM_TYPES:
        return our_body(unflatten(our_form(await _form(request)))), True
    if kind != JSON_TYPE:
        raise ApiError(415, "unsupported_media_type", f"a body is {JSON_TYPE} or {FORM_TYPES[0]}, got {kind[:80]!r}")
    return our_body(parse_json(await request.body())), False


async def _form(request: Request) -> list[tuple[str, str]]:
    try:
        form: FormData = await request.form(max_files=8, max_fields=MOST_FIELDS, max_part_size=2**20)
    except HTTPException as error:  # what Starlette makes of a form that cannot be read
        raise invalid(f"the form cannot be read: {error.detail}", code="invalid_body") from error
    fields = []
    for name, value in form.multi_items():
        if not isinstance(value, str):
            raise ApiError(400, "unsupported", "files are not supported: this model makes videos from text alone", name[:80])
        fields.append((name, value))
    return fields


def parse_json(body: bytes) -> dict[str, Any]:
    """Reads a JSON object; refuses repeated names, NaN, infinite numbers, lone surrogates and deep nesting."""
    try:
        content = json.loads(body, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        said = (
            str(error) if isinstance(error, ValueError) and not isinstance(error, UnicodeError) else "it is nested too deeply"
        )
        if isinstance(error, UnicodeError):
            said = "it is not UTF-8"
        raise invalid(f"the body is not valid JSON: {said}", code="invalid_body") from error
    if not isinstance(content, dict):
        raise invalid("the body must be a JSON object", code="invalid_body")
    _check(content, 0)
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name appears twice in one object")
    return content


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is beyond the largest number")
    return value


def _check(value: Any, depth: int) -> None:
    if depth > DEEPEST:
        raise invalid(f"the body is nested deeper than {DEEPEST} levels", code="invalid_body")
    if isinstance(value, dict):
        for name, held in value.items():
            _check(name, depth)
            _check(held, depth + 1)
    elif isinstance(value, list):
        for held in value:
            _check(held, depth + 1)
    elif isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise invalid("a text contains half of a surrogate pair, which UTF-8 cannot encode", code="invalid_body")


def unflatten(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object of a form's fields, with names like `synopsis[]`, `tar[sigma][0]` and `synopsis[][text]`.

    The n-th `synopsis[][text]` belongs to the n-th object, in whatever order a client sends the fields.
    """
    content: dict[str, Any] = {}
    columns: dict[str, dict[str, list[Any]]] = {}  # lists of objects: their names' values, by the name of the list
    for name, value in fields:
        parts = _parts(name)
        if "" not in parts[:-1]:
            _put(content, parts, value, name)
        elif parts.count("") > 1:
            raise invalid(f"a form cannot hold lists in lists, such as {name[:80]!r}: send JSON", name[:80], "invalid_body")
        else:
            head, _, rest = name.partition("[][")
            columns.setdefault(head, {}).setdefault(rest, []).append(value)
    for head, held in columns.items():
        if len({len(values) for values in held.values()}) > 1:
            said = f"in a form every object of {head[:80]!r} must have the same fields: send JSON"
            raise invalid(said, head[:80], "invalid_body")
        for row in zip(*held.values(), strict=True):
            element: dict[str, Any] = {}
            for rest, value in zip(held, row, strict=True):
                _put(element, _parts(rest.replace("]", "", 1)), value, head)
            _put(content, [*_parts(head), ""], element, head)
    _check(content, 0)
    return content


def _parts(name: str) -> list[str]:
    """Splits `a[b][]` into a, b and an empty part."""
    head = name.partition("[")[0]
    parts = PART.findall(name[len(head) :])
    if "".join(f"[{part}]" for part in parts) != name[len(head) :]:
        raise invalid(f"the name {name[:80]!r} has brackets that do not match", name[:80], "invalid_body")
    if len(parts) > DEEPEST:
        raise invalid(f"the form is nested deeper than {DEEPEST} levels", code="invalid_body")
    return [head, *parts]


def _put(content: dict[str, Any], parts: list[str], value: Any, name: str) -> None:
    """Sets a value at a path; an empty last part appends it to a list."""
    here: Any = content
    for part, following in pairwise(parts):
        here = here.setdefault(part, [] if following == "" else {})
        if not isinstance(here, list if following == "" else dict):
            raise _mixed(name)
    if isinstance(here, list):
        here.append(value)
    elif parts[-1] in here:
        raise _mixed(name)
    else:
        here[parts[-1]] = value


def _mixed(name: str) -> ApiError:
    return invalid(f"the form gives {name[:80]!r} twice, or once as a value and once as a list", name[:80], "invalid_body")
