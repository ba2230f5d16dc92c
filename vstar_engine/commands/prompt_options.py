"""Options for prompts and language models, shared by commands."""

import argparse
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from vstar_engine.artifacts.files import user_cache
from vstar_engine.config.request import MAX_FRAMES
from vstar_engine.prompting.llm import Endpoint, Llm
from vstar_engine.prompting.synopsis import PROMPT, Synopsis, read_prompts, read_synopses, synopsize


def add_llm_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for turning a prompt into states."""
    group = parser.add_argument_group("synopsis")
    group.add_argument("--no-synopsis", action="store_true", help="use the prompt as the only state")
    group.add_argument("--state-count", type=int, metavar="N", help="number of states (default: as many as the prompt needs)")
    group.add_argument("--llm-url", metavar="URL", help="OpenAI-compatible endpoint, such as http://localhost:11434/v1")
    group.add_argument("--llm-model", metavar="NAME", help="chat model at the endpoint")
    group.add_argument("--llm-key-env", metavar="NAME", help="environment variable with the endpoint's API key")
    group.add_argument(
        "--llm-timeout",
        type=float,
        default=Endpoint.timeout,
        metavar="S",
        help="timeout of a request in seconds (default %(default)s)",
    )
    group.add_argument(
        "--llm-required", action="store_true", help="fail when the endpoint fails, instead of falling back to offline rules"
    )


def cache_folder() -> Path | None:
    """Returns the cache folder: $VSTAR_CACHE, or vstar-engine under the user's cache folder; None without a home."""
    if named := os.environ.get("VSTAR_CACHE"):
        return Path(named)
    cache = user_cache()
    return None if cache is None else cache / "vstar-engine"


def llm_from(args: argparse.Namespace) -> Llm | None:
    """Returns the language model that options name; None without --llm-url."""
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
    """Yields a synopsis for each prompt, as options say; a given synopsis is passed on."""
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
    """Yields the prompts of a command that takes many: from the command line, --states and files."""
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


def printable(text: str) -> str:
    """Escapes characters that cannot be encoded as UTF-8."""
    return text.encode(errors="backslashreplace").decode()
