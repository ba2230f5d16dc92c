"""JSON that people write: where it is wrong, and what would do."""

import json
import re
from typing import Any

TRAILING_COMMA = re.compile(r",(\s*[\]}])")


def parse_json(text: str, where: str) -> Any:
    """Parses JSON; ValueError with a hint at the usual slips."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} looks like JSON but is not ({error}){_hint(text, str(error))}") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _hint(text: str, error: str) -> str:
    if error.startswith("Extra data"):
        return "; objects that stand one a line belong into a .jsonl file"
    if TRAILING_COMMA.search(text):
        return "; take out the comma before the closing bracket"
    if "double quotes" in error:
        return "; names and texts stand in double quotes"
    return ""
