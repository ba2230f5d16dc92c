"""Values of settings as callers have them, numpy's and lists among them, made Python's own; ValueError for another kind."""

import operator
from collections.abc import Sequence
from typing import Any


def whole(name: str, value: Any) -> int:
    """Returns a whole number of any integer type."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from error


def real(name: str, value: Any) -> float:
    """Returns a number of any type, NaN among them."""
    if isinstance(value, str | bytes | bool) or not hasattr(value, "__float__"):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def text(name: str, value: Any) -> str:
    """Returns a text."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {value!r}")
    return value


def texts(name: str, values: Any) -> tuple[str, ...]:
    """Returns texts as a tuple; a lone one is not taken for its letters."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a sequence of texts, got {values!r}")
    return tuple(text(f"each of {name}", value) for value in values)


def sides(value: Any) -> tuple[int, int]:
    """Returns (height, width) of a pair of whole numbers."""
    try:
        height, width = value
    except (TypeError, ValueError) as error:
        raise ValueError(f"size must be (height, width) in pixels, got {value!r}") from error
    return whole("a height", height), whole("a width", width)
