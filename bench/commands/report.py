"""Result files as Markdown tables and plots; with --documents, rewrites documents' tables between their markers.

A marker is a line `<!-- bench:NAME -->` up to `<!-- /bench:NAME -->`, NAME one of the tables, or KIND-plots for links to plots.
"""

import argparse
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from vstar_engine.bench.harness.rows import ResultRow, read
from vstar_engine.bench.report import plots
from vstar_engine.bench.report.tables import TABLES, newest

RESULTS = Path(__file__).parents[1] / "results"
# what a document's markers may name
LINKS = {f"{kind}-plots": partial(plots.links, kind=kind) for kind in ("time", "memory", "roofline", "ladder")}
BLOCKS: dict[str, Callable[[Sequence[ResultRow], bool], list[str]]] = {**TABLES, **LINKS}
BLOCK = r"(<!-- {kind}:([\w-]+) -->\n).*?(<!-- /{kind}:\2 -->)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what to read and where to write."""
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.jsonl", help="default: the committed ones")
    parser.add_argument("--tables", choices=TABLES, nargs="+", default=list(TABLES), help="which to print; default all")
    parser.add_argument("--spread", action="store_true", help="print the 20th and 80th percentiles too")
    parser.add_argument("--documents", type=Path, nargs="+", metavar="FILE.md", help="rewrite these documents' tables instead")
    parser.add_argument("--check", action="store_true", help="with --documents: change nothing, exit with 1 if one is old")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="also draw plots there (needs matplotlib)")
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help="of the plots (default %(default)s)")


def rendered(name: str, rows: Sequence[ResultRow], spread: bool = False) -> str:
    """Returns the Markdown of one kind of table."""
    return "\n\n".join(BLOCKS[name](rows, spread))


def renewed(text: str, rows: Sequence[ResultRow]) -> str:
    """Returns a document with the tables between its markers made anew; ValueError for a marker that names no table."""
    return between_markers(text, "bench", BLOCKS, lambda name: rendered(name, rows))


def between_markers(text: str, kind: str, names: Collection[str], made: Callable[[str], str]) -> str:
    """Returns a document with `made(NAME)` between markers `<!-- kind:NAME -->`; raises ValueError for a bad name."""

    def block(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        if name not in names:
            raise ValueError(f"there is no table {name!r} for the marker in the document; there are {', '.join(names)}")
        return f"{opening}\n{made(name) or 'Not measured yet.'}\n\n{closing}"

    return re.sub(BLOCK.format(kind=kind), block, text, flags=re.DOTALL)


def run(args: argparse.Namespace) -> int:
    """Prints, rewrites or checks; 1 where a check finds a document that is not current."""
    files = args.files or sorted(RESULTS.glob("*.jsonl"))
    if not files:
        raise ValueError("there are no results to report; make some with `vstar-engine bench kernels --out FILE.jsonl`")
    rows = newest(read(files))
    stale = 0
    if args.documents:
        for path in args.documents:
            before = path.read_text()
            after = renewed(before, rows)
            if args.check:
                stale |= before != after
                say = "current" if before == after else "not current: run `vstar-engine bench report --documents`"
                print(f"{path} is {say}")
            else:
                path.write_text(after)
                print(f"wrote {path}")
    else:
        for name in args.tables:
            if said := rendered(name, rows, args.spread):
                print(f"## {name}\n\n{said}\n")
    if args.plots:
        for path in plots.draw(rows, args.plots, args.format):
            print(f"wrote {path}")
    return int(stale)
