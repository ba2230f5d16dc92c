"""The `doctor` command: what this machine has and what is missing."""

import argparse
import json
from dataclasses import asdict


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(args: argparse.Namespace) -> int:
    from .installation import examine

    facts = examine()
    if args.json:
        print(json.dumps([asdict(fact) for fact in facts]))
        return 0
    for fact in facts:
        print(f"{'-' if fact.ok is False else ' '} {fact.name:20} {fact.value}")
    return 0
