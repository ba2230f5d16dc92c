"""The `serve` command: settings from flags, environment and file, an engine behind them, and an orderly end."""

import argparse
import asyncio
import signal
from pathlib import Path
from typing import Any

from ..config import model_named
from ..errors import MissingLibrary, VstarError
from ..generate import add_model_options
from ..options import add_config_options
from ..prompting import add_llm_options, llm_from
from .settings import HOUR, MIB, Settings

EXTRA = "pip install 'vstar-engine[serve]'"
LEVELS = ("debug", "info", "warning", "error")
# a server that was asked to end leaves its slowest readers after this many seconds
LAST_ANSWERS = 3


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `serve`; defaults come from `Settings`."""
    _add_server_options(parser.add_argument_group("server"))
    _add_limit_options(parser.add_argument_group("limits"))
    model = parser.add_argument_group("model")
    add_model_options(parser)
    model.add_argument("--embeddings", type=Path, metavar="DIR", help="bundles of `embed`, for requests that name one by its id")
    add_llm_options(parser)
    add_config_options(parser)


def _add_server_options(group: argparse._ArgumentGroup) -> None:
    def add(name: str, **how: Any) -> None:
        how.setdefault("default", getattr(Settings, name))
        group.add_argument(f"--{name.replace('_', '-')}", **how)

    add("host", help="address to listen at (default %(default)s)")
    add("port", type=int, help="default %(default)s")
    add("data", type=Path, metavar="DIR", help="folder of videos and jobs (default %(default)s)")
    add("database", metavar="URL", help="postgresql://... instead of a file in the folder")
    add("instance", metavar="NAME", help="stays the same over restarts, differs between servers of one database")
    group.add_argument("--keys", type=Path, metavar="FILE", help="a key a line, `[OWNER ]KEY`; or $VSTAR_API_KEYS")
    add("insecure", action="store_true", help="listen to other machines without keys")
    add("grace", type=float, metavar="S", help="seconds that running jobs have when the server is to end (default %(default)g)")
    group.add_argument("--log-level", choices=LEVELS, default="info", help="debug logs prompts (default %(default)s)")
    group.add_argument("--log-text", action="store_true", help="log plain lines instead of JSON")


def _add_limit_options(group: argparse._ArgumentGroup) -> None:
    def add(name: str, help: str, kind: type = int, **how: Any) -> None:
        default = getattr(Settings, name)
        said = help if default is None else f"{help} (default %(default)s)"
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=said, **how)

    add("max_queue", "jobs that wait or run")
    add("max_queue_per_key", "jobs of one key that wait or run")
    add("max_frames", "frames of a video")
    add("max_steps", "denoising steps of a video")
    add("max_work", "frames x pixels x steps of a video")
    add("max_batch", "videos that may ride in one batch, where that was measured to pay")
    add("batch_delay", "seconds that a video waits for others to ride with", float, metavar="S")
    add("sync_timeout", "seconds that a request to /v1/videos/sync takes", float, metavar="S")
    group.add_argument(
        "--min-free", type=int, default=Settings.min_free // MIB, metavar="MIB", help="kept free where videos are (default %(default)s)"
    )
    group.add_argument("--keep-hours", type=float, metavar="H", help="delete videos this long after they ended (default: never)")
    group.add_argument("--keep-mib", type=int, metavar="MIB", help="delete the oldest videos beyond this size (default: none)")


def settings_from(args: argparse.Namespace) -> Settings:
    """Gives the settings that options say; ValueError where one makes no sense."""
    same = (
        *("data", "database", "instance", "host", "port", "insecure", "embeddings", "grace", "sync_timeout"),
        *("max_queue", "max_queue_per_key", "max_frames", "max_steps", "max_work", "max_batch", "batch_delay"),
    )
    return Settings(
        **{name: getattr(args, name) for name in same},
        min_free=args.min_free * MIB,
        keep_for=None if args.keep_hours is None else args.keep_hours * HOUR,
        keep_bytes=None if args.keep_mib is None else args.keep_mib * MIB,
    )


def run(args: argparse.Namespace) -> int:
    """Runs `serve` until it is told to end."""
    try:
        from . import app, engines, keys, logs, resolve, server, service
    except ImportError as error:
        if (error.name or "").startswith("vstar_engine"):
            raise
        raise MissingLibrary(f"serving needs {error.name}, which is not installed; {EXTRA}") from error
    settings = settings_from(args)
    known = keys.Keys.read(args.keys)
    settings.check_bind(len(known))
    logs.configure(args.log_level, not args.log_text)
