"""Runs `vstar-engine bench` where the engine is not installed: `python -m vstar_engine.bench WHAT --help`."""

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from vstar_engine.bench.commands import main as commands
from vstar_engine.commands.option_sources import Parser
from vstar_engine.errors import VstarError
from vstar_engine.machine import threads

BAD_SETTING, INTERRUPTED, TERMINATED = 2, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, runs the command and returns its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    words = list(sys.argv[1:] if argv is None else argv)
    threads.prepare()
    try:
        parser = Parser(prog="python -m vstar_engine.bench", description=commands.__doc__)
        commands.add_options(parser)
        return commands.run(parser.parse_args(words, argparse.Namespace(words=words)))
    except KeyboardInterrupt:
        print("vstar-engine: interrupted; the rows so far are kept and marked", file=sys.stderr)
        return INTERRUPTED
    except (VstarError, ValueError) as error:
        print(f"vstar-engine: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, VstarError) else BAD_SETTING


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(TERMINATED)


if __name__ == "__main__":
    raise SystemExit(main())
