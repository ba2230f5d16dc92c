"""Text files that people write: UTF-8 or what a byte-order mark says, and lines that end at a newline alone."""

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@contextmanager
def open_text(path: Path) -> Iterator[TextIOWrapper]:
    """Opens a file for reading in the encoding of its byte-order mark, UTF-8 without one.

    Iterating yields lines that end at a newline (or CR LF), never at U+2028 and the like, which `str.splitlines` splits at.
    """
    with path.open("rb") as file:
        start = file.peek(4)[:4]
        encoding = next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")
        with TextIOWrapper(file, encoding=encoding) as text:
            yield text


def read_text(path: Path) -> str:
    """Reads a whole file as `open_text` does."""
    with open_text(path) as file:
        return file.read()


def unreadable(error: OSError | UnicodeDecodeError) -> str:
    """Says why a file could not be read as text."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is no UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
    return error.strerror or str(error)
