"""What tables of rows are laid out with: the conditions they were measured under, times, groups, Markdown."""

from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import groupby, pairwise
from typing import Any

from vstar_engine.bench.harness.rows import ABOVE, INTERRUPTED, OK, ResultRow, seconds

REMARK = "Faster than the ceiling: what it read lay in the cache, or the machine had slowed down when the ceiling was measured."

# columns of a table; a wider one is laid out as several
WIDEST = 6


def machine_words(row: ResultRow) -> str:
    """Names the machine of a row in a few words."""
    here = row.machine
    if row.device.startswith("cuda"):
        return str(here.get("gpu"))
    return f"{here.get('cpu')}, {here.get('threads')} threads"


def conditions(rows: Sequence[ResultRow], remark: str = "") -> str:
    """Says in a line what a table's numbers belong to, then folds away the commands that print them."""
    first = rows[0]
    days = sorted({row.at[:10] for row in rows})
    commits = sorted({str(row.machine.get("commit"))[:9] + ("+" if row.machine.get("dirty") else "") for row in rows})
    said = [machine_words(first), first.dtype, f"torch {first.machine.get('torch')}"]
    if first.machine.get("driver"):
        said.append(f"driver {first.machine['driver']}")
    said.append(f"commit {', '.join(commits)}")
    said.append(" to ".join(dict.fromkeys((days[0], days[-1]))))
    line = ", ".join(said)
    if any(row.outcome == INTERRUPTED for row in rows):
        line += ". **The run was interrupted; these are its rows so far**"
    if any(row.numbers.get("alone") for row in rows):
        line += ". **Of a contest that was cut off, calls were timed alone**"
    return f"{line}{remark}\n\n{folded(rows)}"


def folded(rows: Sequence[ResultRow]) -> str:
    """Returns a folded block of the commands that print the rows anew."""
    commands = "\n".join(sorted({escape(row.command, quote=False) for row in rows}))
    return f"<details><summary>Command</summary><pre><code>{commands}</code></pre></details>"


def cell(row: ResultRow | None, own: ResultRow | None = None, spread: bool = False) -> str:
    """Writes a provider's time, and how many times `own`'s it is."""
    if row is None:
        return ""
    if row.status != OK:
        return row.status
    said = seconds(row.numbers["median"])
    if spread:
        said += f" [{seconds(row.numbers['p20'])}, {seconds(row.numbers['p80'])}]"
    if own is row:
        return f"**{said}**"
    if own is not None and own.status == OK:
        ratio = row.numbers["median"] / own.numbers["median"]
        said += f" ({ratio:.0f}x)" if ratio >= 20 else f" ({ratio:.2g}x)" if ratio >= 10 else f" ({ratio:.2f}x)"
    return said


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Lays out a table whose first column is words and the others numbers; a wide one as several with the same first column."""
    lines, others = list(body), len(head) - 1
    tables = -(-others // (WIDEST - 1))
    bounds = [1 + others * i // tables for i in range(tables + 1)]
    parts = []
    for low, high in pairwise(bounds):
        kept = [[row[0], *row[low:high]] for row in lines if tables == 1 or any(row[low:high])]
        parts.append(_table([head[0], *head[low:high]], kept))
    said = "\n\n".join(parts)
    return f"{said}\n\n{ABOVE} {REMARK}" if ABOVE in said else said


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Lays out one table."""
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(['---', *['--:'] * (len(head) - 1)])}|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in body)])


def across(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Lays out a table turned on its side: the heads become the first column."""
    first, *rest = zip(head, *body, strict=True)
    return markdown(first, rest)


def grouped(rows: Iterable[ResultRow], key: Callable[[ResultRow], Any]) -> list[list[ResultRow]]:
    """Groups rows by a key, groups and rows in the order in which they came."""
    order: dict[Any, None] = dict.fromkeys(key(row) for row in rows)
    place = {value: i for i, value in enumerate(order)}
    ranked = sorted(rows, key=lambda row: place[key(row)])
    return [list(group) for _, group in groupby(ranked, key=key)]


def part_of(rows: Sequence[ResultRow], part: str, suite: str = "pipeline") -> list[list[ResultRow]]:
    chosen = [row for row in rows if row.suite == suite and row.case["part"] == part]
    return grouped(chosen, lambda row: (row.case["model"], row.case["size"], row.dtype, machine_words(row)))


def titled(rows: Sequence[ResultRow], words: str, remark: str = "") -> str:
    return f"{words}, `{rows[0].case['model']}` at {rows[0].case['size']}; {conditions(rows, remark)}"
