"""Tables of how time and memory grow with the frames."""

from collections.abc import Sequence

from vstar_engine.bench.harness.contest import BANDWIDTH, MATRIX
from vstar_engine.bench.harness.rows import OK, ResultRow, seconds

from .table_cells import conditions, grouped, machine_words, markdown, part_of, titled


def growth(rows: Sequence[ResultRow], spread: bool) -> list[str]:
    """Returns time and peak memory against frames, of every provider: temporal attention by level, then the guided step."""
    attention = [row for row in rows if row.suite == "kernels" and row.case["op"] == "temporal_attention"]

    def same(row: ResultRow) -> tuple[object, ...]:
        return row.case["level"], row.case["layout"], row.case["batch"], row.dtype, machine_words(row)

    found = []
    for group in grouped(attention, same):
        case = group[0].case
        words = f"Temporal attention, level {case['level']}, {case['layout']} layout, batch {case['batch']}"
        found += _table(group, f"{words}; {conditions(group)}")
    for group in part_of(rows, "headline"):
        found += _table(group, titled(group, "One guided step (both branches)"))
    return found


def _table(group: Sequence[ResultRow], title: str) -> list[str]:
    """Lays out providers down and frames across; nothing where there is one length alone."""
    measured = [row for row in group if row.status == OK and row.provider not in (BANDWIDTH, MATRIX)]
    lengths = sorted({row.case["frames"] for row in measured})
    if len(lengths) < 2:
        return []
    body = []
    for name in dict.fromkeys(row.provider for row in measured):
        found = {row.case["frames"]: row for row in measured if row.provider == name}
        cells = [_cell(found.get(frames)) for frames in lengths]
        first, last = found[min(found)], found[max(found)]
        body.append([name, *cells, _ratio(first, last, "median"), _ratio(first, last, "peak_bytes")])
    head = ["frames", *map(str, lengths), "time grows", "memory grows"]
    return [f"{title}\n\n{markdown(head, body)}"]


def _cell(row: ResultRow | None) -> str:
    if row is None:
        return ""
    peak = row.numbers.get("peak_bytes")
    return seconds(row.numbers["median"]) + ("" if peak is None else f", {peak / 2**20:.0f} MiB")


def _ratio(first: ResultRow, last: ResultRow, number: str) -> str:
    before, after = first.numbers.get(number), last.numbers.get(number)
    return f"{after / before:.3g}x" if before and after and first is not last else ""
