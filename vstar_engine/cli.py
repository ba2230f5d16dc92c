"""The command line: generate, synopsis, embed, build, engines, refit, export, serve, submit, status, fetch, cancel, inspect,
convert, verify, bench and doctor.

Exit codes: 0 done; 1 a check failed; 2 a setting makes no sense; 3 bad weights; 4 the output cannot be written; 5 not enough
memory; 6 no such device or dtype; 7 an optional library is missing; 8 the language model gives no answer; 9 a built engine is
damaged, stale or made for something else; 10 a server cannot be reached or refuses; 11 a server's job failed; 130 interrupted,
143 terminated.
"""

import argparse
import json
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

from . import __version__, threads
from .config import DTYPE_NAMES, MODELS
from .errors import MemoryShortage, VstarError
from .options import Parser, layered, to_toml

if TYPE_CHECKING:
    from .verify import Row

BAD_SETTING, INTERRUPTED, TERMINATED = 2, 130, 143
MIB = 2**20
# commands whose settings also come from the environment and a file
LAYERED = ("generate", "synopsis", "embed", "serve", "submit", "status", "fetch", "cancel")


@dataclass(frozen=True)
class Command:
    """A subcommand: what it does, and where its options and its `run` are; that module loads when the command is chosen."""

    help: str
    module: str
    options: str = "add_options"
    run: str = "run"


COMMANDS = {
    "generate": Command("make a video from a prompt or a sequence of states", "generate"),
    "synopsis": Command("describe the states that prompts pass through", "prompting"),
    "embed": Command("encode synopses once, for `generate --embeddings`", "embed"),
    "build": Command("compile the UNet once for this machine, for `generate --engine`", "build"),
    "engines": Command("list the engines that were built, or remove some", "build", "add_engines_options", "run_engines"),
    "refit": Command("swap the weights of a built TensorRT engine", "build", "add_refit_options", "run_refit"),
    "export": Command("write a built engine for another server", "build", "add_export_options", "run_export"),
    "submit": Command("have a server make a video", "remote", "add_submit_options", "run_submit"),
    "status": Command("say how a server's jobs stand", "remote", "add_status_options", "run_status"),
    "fetch": Command("write what a server's job made to a file", "remote", "add_fetch_options", "run_fetch"),
    "cancel": Command("stop a server's jobs", "remote", "add_cancel_options", "run_cancel"),
    "serve": Command("serve videos over HTTP; jobs outlive the server", "serving.command"),
    "inspect": Command(
        "print the settings that made a video, and the command that makes it again", "cli", "add_inspect_options", "run_inspect"
    ),
    "convert": Command(
        "convert an official checkpoint to safetensors, without running code from it",
        "cli",
        "add_convert_options",
        "run_convert",
    ),
    "verify": Command("run golden cases against this installation", "cli", "add_verify_options", "run_verify"),
    "bench": Command("measure speed against clean baselines and the machine's limits, report, compare", "bench.command"),
    "doctor": Command("say what this machine has and what is missing", "cli", "add_doctor_options", "run_doctor"),
}


def build_parser(only: str | None = None) -> tuple[Parser, dict[str, Parser]]:
    """Builds the parser, and gives those of its subcommands by name; where a word is given, only what it names has options."""
    assert __doc__ is not None
    parser = Parser(
        prog="vstar-engine", description="Text to long, dynamic video in one pass.", epilog=__doc__.split("\n\n")[1]
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers: dict[str, Parser] = {}
    for name, command in COMMANDS.items():
        parsers[name] = commands.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        parsers[name].add_argument("-v", "--verbose", action="store_true", help="log more, and show where an error arose")
        if only in (None, name):
            module = import_module(f".{command.module}", __package__)
            parsers[name].set_defaults(run=getattr(module, command.run))
            getattr(module, command.options)(parsers[name])
    return parser, parsers


def add_inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)


def run_inspect(args: argparse.Namespace) -> int:
    from .provenance import command_for
    from .video import read_provenance

    provenance = read_provenance(args.file)
    print(json.dumps(provenance, indent=2))
    print(command_for(provenance))
    return 0


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    from .convert import GUIDANCE, LORA_FILE, SHARD_BYTES

    said = "model.ckpt, .pt or .safetensors in the official key naming, or a LoRA that is a pickled list (T2V-Turbo's)"
    parser.add_argument("source", type=Path, help=said)
    parser.add_argument("out", type=Path, help=f"folder to make; of a LoRA a file that ends in {LORA_FILE}")
    parser.add_argument("--model", default="videocrafter2", help=f"one of {', '.join(MODELS)} (default %(default)s)")
    parser.add_argument("--dtype", default="float16", help=f"stored as one of {', '.join(DTYPE_NAMES)} (default %(default)s)")
    parser.add_argument(
        "--shard-size", type=int, default=SHARD_BYTES // MIB, metavar="MIB", help="largest file (default %(default)s)"
    )
    parser.add_argument("--memory-limit", type=int, metavar="MIB", help="most memory the reading process may hold")
    said = "of a LoRA that was trained to be told a guidance scale: which (default %(default)s)"
    parser.add_argument("--embedded-guidance", type=float, default=GUIDANCE, metavar="SCALE", help=said)
    parser.add_argument("--force", action="store_true", help="replace what exists")


def run_convert(args: argparse.Namespace) -> int:
    from .convert import LORA_FILE, convert, convert_lora

    limit = None if args.memory_limit is None else args.memory_limit * MIB
    if args.out.suffix == LORA_FILE:
        convert_lora(args.source, args.out, args.model, args.embedded_guidance, args.force, limit)
        print(f"wrote {args.out}: {args.out.stat().st_size / MIB:.0f} MiB, for --lora {args.out}")
        return 0
    with tqdm(desc="convert", unit="tensor", file=sys.stderr, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        convert(args.source, args.out, args.model, args.dtype, args.shard_size * MIB, args.force, limit, progress)
    files = sorted(args.out.iterdir())
    print(f"wrote {args.out}: {len(files)} files, {sum(file.stat().st_size for file in files) / MIB:.0f} MiB in {args.dtype}")
    return 0


def add_verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "golden_dir", nargs="?", type=Path, help="folder with a manifest.json (default: tests/golden of the checkout)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a JSON object per case")


def run_verify(args: argparse.Namespace) -> int:
    from .device import device_named, dtype_named
    from .golden import Golden
    from .verify import verify

    shipped = Path(__file__).parent.parent / "tests" / "golden"
    if args.golden_dir is None and not shipped.is_dir():
        raise ValueError("no golden cases lie beside this installation; give a folder: vstar-engine verify FOLDER")
    folder = args.golden_dir or shipped
    golden = Golden(folder)
    device = device_named(args.device, dtype_named("float32"))
    failed = passed = 0
    for row in verify(golden, str(device)):
        print(json.dumps(asdict(row)) if args.json else _line(row), flush=True)
        passed, failed = passed + row.ok, failed + (not row.ok)
    if not args.json:
        print(f"{passed} of {passed + failed} cases agree with {folder}")
    return 1 if failed or not passed else 0


def _line(row: "Row") -> str:
    verdict = "ok" if row.ok else "FAILED"
    numbers = f"{row.worst.error:9.2e} <= {row.worst.tolerance:.1e} {row.worst.output}" if row.worst else row.note
    if row.worst and not row.ok:
        numbers = numbers.replace("<=", "> ")
    return f"{row.kind:24} {row.name:34} {verdict:6} {numbers}"


def add_doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run_doctor(args: argparse.Namespace) -> int:
    from . import doctor

    facts = doctor.examine()
    if args.json:
        print(json.dumps([asdict(fact) for fact in facts]))
        return 0
    for fact in facts:
        print(f"{'-' if fact.ok is False else ' '} {fact.name:20} {fact.value}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and gives its exit code; one sentence on stderr says what went wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = "-v" in words or "--verbose" in words
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    # ours alone: the exporter and its libraries would log hundreds of lines
    logging.getLogger(__package__).setLevel(logging.INFO if verbose else logging.WARNING)
    signal.signal(signal.SIGTERM, _terminate)
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
        return args.run(args)
    except KeyboardInterrupt:
        return _say("interrupted; nothing half-written is left", INTERRUPTED)
    except (VstarError, ValueError) as error:
        if verbose:
            logging.getLogger(__name__).info("where it arose:", exc_info=error)
        return _say(str(error), error.exit_code if isinstance(error, VstarError) else BAD_SETTING)
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        return _say(f"the device ran out of memory: {str(error).splitlines()[0]}", MemoryShortage.exit_code)


def _out_of_memory(error: RuntimeError) -> bool:
    """Says whether PyTorch, where it is loaded, means a device's memory."""
    return "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError)


def _say(sentence: str, code: int) -> int:
    print(f"vstar-engine: {sentence}".encode(errors="backslashreplace").decode(), file=sys.stderr)
    return code


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(TERMINATED)


if __name__ == "__main__":
    raise SystemExit(main())
