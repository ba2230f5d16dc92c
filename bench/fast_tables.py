"""Tables of what `--fast` saves and costs."""

from collections.abc import Sequence
from typing import Any

from .fast import EXACT, OPTIONS
from .layout import cell, grouped, machine_words, markdown, part_of, titled
from .rows import OK, Row

WAY, WAY_WORDS = (0.0, 0.25, 0.5, 0.75, 1.0), ("the first step", "a quarter", "half", "three quarters", "the last step")


def fast(rows: Sequence[Row], spread: bool) -> list[str]:
    """What each option of --fast saves and costs."""
    found = []
    for group in part_of(rows, "fast"):
        first = group[0].case
        lengths = sorted({row.case["frames"] for row in group})
        table = {(row.provider, row.case["frames"]): row for row in group}
        body = []
        for name in OPTIONS:
            line = [name]
            for frames in lengths:
                row, exact = table.get((name, frames)), table.get((EXACT, frames))
                line += [cell(row, exact, spread) + _first(row), _strayed(row) if row is not exact else ""]
            body.append(line)
        head = ["`--fast`", *(words for frames in lengths for words in (f"{frames} frames", "strays (cosine)"))]
        words = f"The steps of a video, {first['steps']} unless few, guidance {first['guidance']:g}, {first['weights']} weights"
        found.append(f"{titled(group, words)}\n\n{markdown(head, body)}")
    return found


def strays(rows: Sequence[Row], spread: bool) -> list[str]:
    """How far each option of --fast strays on the way, as shares of the steps."""
    found = []
    for group in grouped([row for row in rows if row.suite == "pipeline" and row.case["part"] == "fast"], _strays_of):
        body = []
        for row in sorted(group, key=lambda row: OPTIONS.index(row.provider)):
            if row.status == OK and len(row.numbers["errors"]) > 1 and row.provider != EXACT:
                errors = row.numbers["errors"]
                body.append([row.provider, *(f"{errors[round(share * (len(errors) - 1))]:.3f}" for share in WAY)])
        if body:
            words = f"Relative difference of the latents on the way, {group[0].case['frames']} frames"
            found.append(f"{titled(group, words)}\n\n{markdown(['after', *WAY_WORDS], body)}")
    return found


def _first(row: Row | None) -> str:
    return " (its first)" if row is not None and row.status == OK and row.note else ""


def _strays_of(row: Row) -> Any:
    return row.case["model"], row.case["size"], row.case["frames"], row.dtype, machine_words(row)


def _strayed(row: Row | None) -> str:
    if row is None or row.status != OK:
        return ""
    return f"{row.numbers['last_error']:.3f} ({row.numbers['last_cosine']:.3f})"
