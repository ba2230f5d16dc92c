"""The command line: generate, synopsis, embed, build, engines, refit, export, serve, submit, status, fetch, cancel, inspect,
enhance, convert, verify, bench and doctor."""

import argparse
import errno
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import NoReturn

from vstar_engine.errors import MemoryShortage, OutputError, VstarError
from vstar_engine.machine import threads
from vstar_engine.version import __version__

from .option_sources import Parser, layered, to_toml

PACKAGE = "vstar_engine"
# printed where no command is given; the bundled model makes each run as it stands
EXAMPLES = """\
vstar-engine makes long videos from text. Three commands to start with:

  vstar-engine generate "a meadow from winter to spring" --model mini --out spring.mp4   # make a video
  vstar-engine inspect spring.mp4   # print its settings, and the command that makes it again
  vstar-engine serve --model mini   # serve videos over HTTP, on port 8000

vstar-engine --help lists all commands; vstar-engine COMMAND --help says what one takes."""
# a constant, as Python started with -OO has no docstrings
EXIT_CODES = (
    "Exit codes: 0 done; 1 a check failed; 2 a setting makes no sense; 3 bad weights; 4 the output cannot be "
    "written; 5 not enough memory; 6 no such device or dtype; 7 an optional library is missing; 8 the language "
    "model gives no answer; 9 a built engine is damaged, stale or made for something else; 10 a server cannot be "
    "reached or refuses; 11 a server's job failed; 12 a video came out as NaN; 13 weights cannot be downloaded; "
    "130 interrupted, 143 terminated."
)
BAD_SETTING, INTERRUPTED, CLOSED_PIPE, TERMINATED = 2, 130, 141, 143
# commands whose settings also come from the environment and a file
LAYERED = ("generate", "synopsis", "embed", "serve", "submit", "status", "fetch", "cancel")


@dataclass(frozen=True)
class Command:
    """A subcommand: its help, and the module of its options and `run`, which is imported when the command is chosen."""

    help: str
    module: str
    options: str = "add_options"
    run: str = "run"


COMMANDS = {
    "generate": Command("make a video from a prompt or a sequence of states", "commands.generate"),
    "synopsis": Command("turn prompts into synopses: the states a video passes through", "commands.synopsis"),
    "embed": Command("encode prompts once, for `generate --embeddings`", "commands.embed"),
    "build": Command("compile the UNet once for this machine, for `generate --engine`", "export.commands.build"),
    "engines": Command("list the engines that were built, or remove some", "commands.engines"),
    "refit": Command("swap the weights of a built TensorRT engine", "export.commands.refit"),
    "export": Command("write a built engine for another server", "export.commands.export"),
    "submit": Command("have a server make a video", "commands.remote_jobs", "add_submit_options", "run_submit"),
    "status": Command("show the state of a server's jobs", "commands.remote_jobs", "add_status_options", "run_status"),
    "fetch": Command("download the video of a server's job", "commands.remote_jobs", "add_fetch_options", "run_fetch"),
    "cancel": Command("cancel a server's jobs", "commands.remote_jobs", "add_cancel_options", "run_cancel"),
    "serve": Command("serve videos over HTTP; jobs survive restarts", "commands.serve"),
    "inspect": Command("print the settings that made a video, and the command that makes it again", "commands.inspect"),
    "enhance": Command("enlarge a video of any length, with detail by a text-to-video model", "commands.enhance"),
    "convert": Command("convert an official checkpoint to safetensors; runs no code from it", "commands.convert"),
    "pull": Command("fetch a model's weights from the Hub and convert them once", "commands.pull"),
    "weights": Command("list the weights that were converted into the cache, or remove some", "commands.cached_weights"),
    "verify": Command("run golden cases against this installation", "commands.verify"),
    "bench": Command("measure speed against clean baselines and the machine's limits, report, compare", "bench.commands.main"),
    "doctor": Command("show what is installed on this machine and what is missing", "commands.doctor"),
}


def build_parser(only: str | None = None) -> tuple[Parser, dict[str, Parser]]:
    """Returns the parser and those of its subcommands by name; with `only`, other subcommands get no options."""
    parser = Parser(prog="vstar-engine", description="Text to long, dynamic video in one pass.", epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers: dict[str, Parser] = {}
    for name, command in COMMANDS.items():
        parsers[name] = commands.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        parsers[name].add_argument("-v", "--verbose", action="store_true", help="log more, with the traceback of an error")
        if only in (None, name):
            module = import_module(f"{PACKAGE}.{command.module}")
            parsers[name].set_defaults(run=getattr(module, command.run))
            getattr(module, command.options)(parsers[name])
    return parser, parsers


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; an error is one sentence on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(EXAMPLES)
        return 0
    verbose = "-v" in words or "--verbose" in words
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    # ours alone: the exporter and its libraries would log hundreds of lines
    logging.getLogger(PACKAGE).setLevel(logging.INFO if verbose else logging.WARNING)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a letter that the terminal's encoding lacks is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    if words[:1] != ["serve"]:  # which computes in its workers alone: each of them is given what it needs when it starts
        threads.prepare()
    try:
        parser, parsers = build_parser(words[0] if words else "")
        if words and words[0] in LAYERED and not {"-h", "--help"} & set(words):
            args = layered(parsers[words[0]], words[1:])
            if args.print_config:
                print(to_toml(args), end="")
                return 0
        else:
            args = parser.parse_args(words, argparse.Namespace(words=words))
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _close_stdout()
        return CLOSED_PIPE
    except KeyboardInterrupt:
        return _say("interrupted; nothing half-written is left", INTERRUPTED)
    except (VstarError, ValueError) as error:
        if verbose:
            logging.getLogger(__name__).info("where it arose:", exc_info=error)
        return _say(str(error), error.exit_code if isinstance(error, VstarError) else BAD_SETTING)
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        _close_stdout()
        return _say(f"cannot write to standard output: {error.strerror}", OutputError.exit_code)
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        return _say(f"the device ran out of memory: {str(error).splitlines()[0]}", MemoryShortage.exit_code)


def _close_stdout() -> None:
    """Leads standard output nowhere, so that Python does not fail once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _out_of_memory(error: RuntimeError) -> bool:
    """Returns whether an error is PyTorch's out-of-memory error."""
    return "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError)


def _say(sentence: str, code: int) -> int:
    print(f"vstar-engine: {sentence}".encode(errors="backslashreplace").decode(), file=sys.stderr)
    return code


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(TERMINATED)


if __name__ == "__main__":
    raise SystemExit(main())
