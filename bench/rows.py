"""Results as JSON lines: one row a variant, on disk before the next one starts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .timing import machine


class Rows:
    """Appends rows to a file, flushed one by one, and prints each; remembers what failed."""

    def __init__(self, path: Path | None):
        self.path = path
        self.machine = machine()
        self.failures: list[str] = []

    def write(self, name: str, params: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
        """Records what a variant measured."""
        self._append({"name": name, "params": params, "numbers": numbers, "error": None})

    def fail(self, name: str, params: Mapping[str, Any], error: str) -> None:
        """Records in a sentence why a variant has no numbers."""
        self.failures.append(name)
        self._append({"name": name, "params": params, "numbers": {}, "error": error})

    def skip(self, name: str, params: Mapping[str, Any], reason: str) -> None:
        """Records a variant that was not tried; that is no failure."""
        self._append({"name": name, "params": params, "numbers": {}, "error": f"skipped: {reason}"})

    def _append(self, row: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({**row, "machine": self.machine}) + "\n")
        print(f"{row['name']}: {row['error'] or _words(row['numbers'])}", flush=True)


def _words(numbers: Mapping[str, Any]) -> str:
    tables = {key: value for key, value in numbers.items() if isinstance(value, Mapping)}
    words = [", ".join(f"{key} {_short(value)}" for key, value in numbers.items() if key not in tables)]
    for key, table in tables.items():
        words.append(f"  {key}: " + ", ".join(f"{name} {_short(value)}" for name, value in table.items()))
    return "\n".join(words)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def sentence(error: BaseException) -> str:
    """Gives an exception's type and the first line that says something, for a row."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
