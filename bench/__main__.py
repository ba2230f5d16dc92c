"""Runs one measurement: `python -m vstar_engine.bench NAME --help`."""

import argparse
from importlib import import_module

from vstar_engine.errors import VstarError

COMMANDS = {
    "kernels": "temporal attention on this CPU against the published path and PyTorch's own attention",
    "transformer": "the temporal transformer on this CPU against the published passes",
    "roofline": "FLOPs, bytes and floor of every op of one forward, computed from the architecture",
    "unet": "one forward of the UNet: time, FLOP/s, peak memory and where the time goes",
}


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, runs the command and gives its exit code."""
    parser = argparse.ArgumentParser(prog="python -m vstar_engine.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in COMMANDS.items():
        module = import_module(f"vstar_engine.bench.{name}")
        module.add_arguments(commands.add_parser(name, help=words, description=module.__doc__))
    args = parser.parse_args(argv)
    try:
        return import_module(f"vstar_engine.bench.{args.command}").run(args)
    except (VstarError, ValueError) as error:
        print(f"error: {error}")
        return error.exit_code if isinstance(error, VstarError) else 2


if __name__ == "__main__":
    raise SystemExit(main())
