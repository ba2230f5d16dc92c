"""What tables of rows are laid out with: the conditions they were measured under, times, groups, Markdown."""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from vstar_engine.bench.harness.rows import ABOVE, INTERRUPTED, OK, ResultRow, seconds

REMARK = "Faster than the ceiling: what it read lay in the cache, or the machine had slowed down when the ceiling was measured."


def machine_words(row: ResultRow) -> str:
    """Names the machine of a row in a few words."""
    here = row.machine
    if row.device.startswith("cuda"):
        return str(here.get("gpu"))
    return f"{here.get('cpu')}, {here.get('threads')} threads"


def conditions(rows: Sequence[ResultRow]) -> str:
    """Says in a line what a table's numbers belong to."""
    first = rows[0]
    days = sorted({row.at[:10] for row in rows})
    commits = sorted({str(row.machine.get("commit"))[:9] + ("+" if row.machine.get("dirty") else "") for row in rows})
    commands = sorted({row.command for row in rows})
    said = [machine_words(first), first.dtype, f"torch {first.machine.get('torch')}"]
    if first.machine.get("driver"):
        said.append(f"driver {first.machine['driver']}")
    said.append(f"commit {', '.join(commits)}")
    said.append(" to ".join(dict.fromkeys((days[0], days[-1]))))
    line = f"{', '.join(said)}: {', '.join(f'`{command}`' for command in commands)}"
    if any(row.outcome == INTERRUPTED for row in rows):
        line += ". **The run was interrupted; these are its rows so far**"
    if any(row.numbers.get("alone") for row in rows):
        line += ". **Of a contest that was cut off, calls were timed alone**"
    return line


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
    """Lays out a table whose first column is words and the others numbers."""
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(['---', *['--:'] * (len(head) - 1)])}|"]
    table = "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in body)])
    return f"{table}\n\n{ABOVE} {REMARK}" if ABOVE in table else table


def grouped(rows: Iterable[ResultRow], key: Callable[[ResultRow], Any]) -> list[list[ResultRow]]:
    """Groups rows by a key, groups and rows in the order in which they came."""
    order: dict[Any, None] = dict.fromkeys(key(row) for row in rows)
    place = {value: i for i, value in enumerate(order)}
    ranked = sorted(rows, key=lambda row: place[key(row)])
    return [list(group) for _, group in groupby(ranked, key=key)]


def part_of(rows: Sequence[ResultRow], part: str, suite: str = "pipeline") -> list[list[ResultRow]]:
    chosen = [row for row in rows if row.suite == suite and row.case["part"] == part]
    return grouped(chosen, lambda row: (row.case["model"], row.case["size"], row.dtype, machine_words(row)))


def titled(rows: Sequence[ResultRow], words: str) -> str:
    return f"{words}, `{rows[0].case['model']}` at {rows[0].case['size']}; {conditions(rows)}"
