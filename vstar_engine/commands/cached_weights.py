"""The `weights` command: converted weights in the cache, listed and removed."""

import argparse
import json

from vstar_engine.weights.converted import cache_root, entries, remove

MIB, GIB = 2**20, 2**30


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `weights`."""
    parser.add_argument("action", nargs="?", choices=("list", "rm"), default="list")
    parser.add_argument("name", nargs="*", help="weights to remove")
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(args: argparse.Namespace) -> int:
    """Lists the weights that were converted here, or removes some."""
    if args.action == "rm":
        if not args.name:
            raise ValueError("name the weights to remove: vstar-engine weights rm NAME")
        for name in args.name:
            print(f"removed {remove(name)}")
        return 0
    if args.name:
        raise ValueError(f"`weights list` takes no names, got {', '.join(args.name)}")
    found = list(entries())
    if args.json:
        rows = [
            {"name": one.folder.name, "model": one.manifest["model"], "dtype": one.manifest["dtype"]}
            | {"origin": one.origin, "folder": str(one.folder), "bytes": one.bytes}
            for one in found
        ]
        print(json.dumps(rows))
        return 0
    for one in found:
        print(f"{one.bytes / MIB:8.0f} MiB  {one.folder.name}  {one.origin}")
    print(f"{len(found)} in {cache_root()}, {sum(one.bytes for one in found) / GIB:.2f} GiB")
    return 0
