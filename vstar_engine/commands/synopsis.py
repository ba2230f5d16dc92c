"""The `synopsis` command: turns prompts into states."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from vstar_engine.artifacts.files import check_writable, write_aside
from vstar_engine.prompting.synopsis import Synopsis

from .option_sources import add_config_options
from .prompt_options import add_llm_options, printable, prompts_given, synopses


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `synopsis`."""
    parser.add_argument("prompt", nargs="*", help="what each video shows")
    parser.add_argument("--prompts", metavar="FILE", help="file with a prompt or a JSON synopsis on each line")
    parser.add_argument(
        "--out", metavar="FILE", help="file to write: .json for a list, .jsonl for lines (default: print a list)"
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    add_llm_options(parser)
    add_config_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs `synopsis`; writes each synopsis as soon as it is made."""
    made = synopses(args, prompts_given(args), args.state_count)
    if args.out is None:
        _write(made, sys.stdout, as_list=True)
        return 0
    out = Path(args.out)
    check_writable(out, args.force)
    with write_aside(out) as aside, aside.open("w", encoding="utf-8") as file:
        count = _write(made, file, as_list=out.suffix != ".jsonl")
    print(f"wrote {out}: {count} {'synopsis' if count == 1 else 'synopses'}")
    return 0


def _write(made: Iterable[Synopsis], file: IO[str], as_list: bool) -> int:
    """Writes a JSON list with an element on each line, or JSON lines; returns their number."""
    count, before, between, after = 0, *(("[\n", ",\n", "\n]\n") if as_list else ("", "\n", "\n"))
    for count, synopsis in enumerate(made, 1):
        file.write((before if count == 1 else between) + printable(json.dumps(synopsis.entry(), ensure_ascii=False)))
    file.write(after if count else before + after if as_list else "")
    return count
