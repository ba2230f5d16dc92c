"""The `engines` command: built engines, listed and removed."""

import argparse
import json
from typing import Any

from vstar_engine.artifacts.built_engine import BuiltEngine, engines, engines_root, remove
from vstar_engine.errors import EngineError

MIB, GIB = 2**20, 2**30


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `engines`."""
    parser.add_argument("action", nargs="?", choices=("list", "rm"), default="list")
    parser.add_argument("name", nargs="*", help="engines to remove: names or folders")
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(args: argparse.Namespace) -> int:
    """Lists the engines built here, or removes some."""
    if args.action == "rm":
        if not args.name:
            raise ValueError("name the engines to remove: vstar-engine engines rm NAME")
        for name in args.name:
            print(f"removed {remove(name)}")
        return 0
    if args.name:
        raise ValueError(f"`engines list` takes no names, got {', '.join(args.name)}")
    found = list(engines(engines_root()))
    if args.json:
        print(json.dumps([_row(artifact) for artifact in found]))
        return 0
    for artifact in found:
        row = _row(artifact)
        print(row["fault"] if "fault" in row else f"{row['bytes'] / MIB:8.0f} MiB  {row['made']}  {row['name']}")
    whole = sum(artifact.bytes for artifact in found if isinstance(artifact, BuiltEngine))
    print(f"{len(found)} engines in {engines_root()}, {whole / GIB:.2f} GiB")
    return 0


def _row(artifact: BuiltEngine | EngineError) -> dict[str, Any]:
    if isinstance(artifact, EngineError):
        return {"fault": str(artifact)}
    about = {name: artifact.manifest[name] for name in ("made", "seconds")}
    # what `engines rm` takes, also where the folder was named by --out or renamed
    return {"name": artifact.folder.name, **about, "folder": str(artifact.folder), "bytes": artifact.bytes, **artifact.identity}
