"""The `synopsis` command, and the options for prompts, states and language models that other commands share."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from vstar_engine.artifacts.files import check_writable, user_cache, write_aside
from vstar_engine.config.request import MAX_FRAMES
from vstar_engine.prompting.llm import Endpoint, Llm
from vstar_engine.prompting.synopsis import PROMPT, Synopsis, read_prompts, read_synopses, synopsize

from .option_sources import add_config_options


def add_llm_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how a prompt becomes states."""
    group = parser.add_argument_group("synopsis")
    group.add_argument("--no-synopsis", action="store_true", help="use a prompt as it is, as the only state")
    group.add_argument("--state-count", type=int, metavar="N", help="states of a prompt (default: as many as it needs)")
    group.add_argument("--llm-url", metavar="URL", help="OpenAI-compatible endpoint such as http://localhost:11434/v1")
    group.add_argument("--llm-model", metavar="NAME", help="the chat model to ask there")
    group.add_argument("--llm-key-env", metavar="NAME", help="environment variable that holds the endpoint's key")
    group.add_argument(
        "--llm-timeout", type=float, default=Endpoint.timeout, metavar="S", help="seconds for one answer (default %(default)s)"
    )
    group.add_argument("--llm-required", action="store_true", help="fail where the endpoint does; else offline rules serve")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `synopsis`."""
    parser.add_argument("prompt", nargs="*", help="what each video shows")
    parser.add_argument("--prompts", metavar="FILE", help="a prompt a line, or a synopsis as a JSON object")
    parser.add_argument("--out", metavar="FILE", help="a .json list, or .jsonl with one a line (default: print the list)")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    add_llm_options(parser)
    add_config_options(parser)


def cache_folder() -> Path | None:
    """Returns the folder for what can be made again: $VSTAR_CACHE, or vstar-engine under the user's; None without a home."""
    if named := os.environ.get("VSTAR_CACHE"):
        return Path(named)
    cache = user_cache()
    return None if cache is None else cache / "vstar-engine"


def llm_from(args: argparse.Namespace) -> Llm | None:
    """Returns the language model asked for; None where there is none to ask."""
    if args.llm_url is None:
        if args.llm_required:
            raise ValueError("--llm-required needs an endpoint: give --llm-url and --llm-model")
        return None
    key = None
    if args.llm_key_env is not None and not (key := os.environ.get(args.llm_key_env)):
        raise ValueError(f"the environment variable {args.llm_key_env}, named by --llm-key-env, holds no key")
    cache = cache_folder()
    return Llm(Endpoint(args.llm_url, args.llm_model or "", key, args.llm_timeout), cache and cache / "synopses")


def synopses(
    args: argparse.Namespace, prompts: Iterable[str | Synopsis], count: int | None, most: int = MAX_FRAMES
) -> Iterator[Synopsis]:
    """Returns a synopsis of each prompt, as the options say; a synopsis stays what it is."""
    llm = None if args.no_synopsis else llm_from(args)
    if count is not None and not 1 <= count <= most:
        raise ValueError(f"a prompt can become 1 to {most} states here, got {count}")
    for prompt in prompts:
        if isinstance(prompt, Synopsis):
            yield prompt
        elif args.no_synopsis:
            yield Synopsis(prompt, (prompt,), PROMPT)
        else:
            yield synopsize(prompt, count, most, llm, args.llm_required)


def prompts_given(args: argparse.Namespace) -> Iterator[str | Synopsis]:
    """Returns the prompts of a command that takes many: words of the command line, --states, and lines of files."""
    states, file = getattr(args, "states", None), getattr(args, "synopsis", None)
    if not (args.prompt or args.prompts or states or file):
        raise ValueError("there is nothing to do; give prompts, or --prompts FILE with one a line")
    yield from args.prompt
    if states:
        yield Synopsis(states[0], tuple(states))
    if file:
        yield from read_synopses(file)
    if args.prompts:
        yield from read_prompts(args.prompts)


def run(args: argparse.Namespace) -> int:
    """Runs `synopsis`: each is written as soon as it is known."""
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
    """Writes a JSON list with an element a line, or the elements alone; gives their number."""
    count, before, between, after = 0, *(("[\n", ",\n", "\n]\n") if as_list else ("", "\n", "\n"))
    for count, synopsis in enumerate(made, 1):
        file.write((before if count == 1 else between) + printable(json.dumps(synopsis.entry(), ensure_ascii=False)))
    file.write(after if count else before + after if as_list else "")
    return count


def printable(text: str) -> str:
    """Spells out what no terminal or file can hold."""
    return text.encode(errors="backslashreplace").decode()
