"""The table of a video beside busy neighbours."""

from collections.abc import Sequence
from dataclasses import replace

from vstar_engine.bench.harness.rows import OK, ResultRow

from .table_cells import cell, grouped, machine_words, markdown, titled


def busy(rows: Sequence[ResultRow], spread: bool) -> list[str]:
    """Returns a video's time by how idle threads wait: ways down, numbers of busy neighbours across."""
    found = []
    chosen = [row for row in rows if row.suite == "busy" and "neighbours" in row.case]
    for group in grouped(chosen, lambda row: (row.case["frames"], row.case["steps"], machine_words(row))):
        counts = sorted({row.case["neighbours"] for row in group})
        table = {(row.provider, row.case["neighbours"]): row for row in group}
        body = []
        for way in dict.fromkeys(row.provider for row in group):
            quiet = table.get((way, 0))
            body.append([way, *(_beside(table.get((way, count)), quiet, spread) for count in counts)])
        case = group[0].case
        title = titled(group, f"Denoising {case['frames']} frames in {case['steps']} steps beside busy processes")
        allowed = {row.case["neighbours"]: row.numbers["allowed"] for row in group}
        heads = [f"{count} (allowed {allowed[count]:.2f}x)" if count else "alone" for count in counts]
        found.append(f"{title}\n\n{markdown(['busy processes', *heads], body)}")
    return found


def _beside(row: ResultRow | None, quiet: ResultRow | None, spread: bool) -> str:
    """Returns a time and how many times the quiet one it is; of a row that failed also that."""
    if row is None:
        return ""
    said = cell(replace(row, status=OK), quiet if row is not quiet else None, spread)
    return said if row.status == OK else f"{said}, {row.status}"
