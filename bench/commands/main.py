"""`vstar-engine bench`: measure, report and compare. Also `python -m vstar_engine.bench`, which needs fewer libraries."""

import argparse
import re
import shlex
from collections.abc import Sequence
from importlib import import_module
from typing import Any

COMMANDS = {
    "kernels": "every op the project fuses, against the ways to compute it without",
    "pipeline": "a video by stage, the engine against clean baselines, the ladder from the published behaviour, a profile",
    "engine": "cold start, load, first step, build, size on disk, memory",
    "serve": "the server under load: latencies, throughput, and what it adds to the bare engine",
    "busy": "a video beside processes that keep the cores busy, by how idle threads wait",
    "report": "result files as tables and plots; rewrites a document's tables",
    "compare": "two result files, or this engine and another commit's, with a verdict that respects the spread",
    "roofline": "FLOPs, bytes and floor of every op of one forward, computed from the architecture",
}

OUT = re.compile("--out(=|$)")
# what comes before the last part of an absolute path, alone or behind a flag
PATH = re.compile("(^|=)/(?:.*/)?(?=[^/])")


def add_options(parser: Any) -> None:
    """Adds a subcommand per thing that can be done."""
    commands = parser.add_subparsers(dest="measurement", required=True, metavar="WHAT")
    for name, words in COMMANDS.items():
        module = import_module(f"vstar_engine.bench.commands.{name}")
        module.add_arguments(commands.add_parser(name, help=words, description=module.__doc__, allow_abbrev=False))


def command_line(words: Sequence[str]) -> str:
    """Writes a measurement's command as typed, but for where it wrote its rows; of an absolute path it keeps the last part."""
    kept = [word for before, word in zip(["", *words], words, strict=False) if before != "--out" and not OUT.match(word)]
    return shlex.join(["vstar-engine", "bench", *(PATH.sub(r"\1", word) for word in kept)])


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand and returns its exit code; `args.words` are what was typed."""
    args.command_line = command_line(args.words[args.words.index(args.measurement) :])
    return import_module(f"vstar_engine.bench.commands.{args.measurement}").run(args)
