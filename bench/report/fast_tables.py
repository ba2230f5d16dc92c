"""Tables of what `--fast` saves and costs."""

from collections.abc import Sequence
from typing import Any

from vstar_engine.bench.harness.rows import OK, ResultRow
from vstar_engine.bench.step.fast_modes import EXACT, OPTIONS
from vstar_engine.config.sampling import FEW_STEP

from .table_cells import cell, grouped, machine_words, markdown, part_of, titled


def fast(rows: Sequence[ResultRow], spread: bool) -> list[str]:
    """Returns what each option of --fast saves and costs."""
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


def strays(rows: Sequence[ResultRow], spread: bool) -> list[str]:
    """Returns how far each option of --fast strays after every step."""
    found = []
    for group in grouped([row for row in rows if row.suite == "pipeline" and row.case["part"] == "fast"], _strays_of):
        measured = {row.provider: row.numbers["errors"] for row in group if row.status == OK and row.provider != EXACT}
        few = measured.pop(FEW_STEP, [])
        names = [name for name in OPTIONS if name in measured]
        parts = [titled(group, f"Relative difference of the latents after every step, {group[0].case['frames']} frames")]
        if names:
            steps = zip(*(measured[name] for name in names), strict=True)
            body = [[str(done), *(f"{error:.3f}" for error in errors)] for done, errors in enumerate(steps, 1)]
            parts.append(markdown(["step", *names], body))
        if few:
            errors = ", ".join(f"{error:.3f}" for error in few)
            parts.append(f"What {FEW_STEP}'s steps take for the finished latents strays from the exact run's last by {errors}.")
        if measured or few:
            found.append("\n\n".join(parts))
    return found


def _first(row: ResultRow | None) -> str:
    return " (its first)" if row is not None and row.status == OK and row.note else ""


def _strays_of(row: ResultRow) -> Any:
    return row.case["model"], row.case["size"], row.case["frames"], row.dtype, machine_words(row)


def _strayed(row: ResultRow | None) -> str:
    if row is None or row.status != OK:
        return ""
    return f"{row.numbers['last_error']:.3f} ({row.numbers['last_cosine']:.3f})"
