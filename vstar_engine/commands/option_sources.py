"""Reads options from flags, else the environment, else a configuration file, else their defaults."""

import argparse
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vstar_engine.artifacts.text_file import read_text

PREFIX = "VSTAR_"
# the ways to say what a video shows, of which a command takes one
ALTERNATIVES = {"prompt", "prompts", "states", "synopsis", "embeddings"}


class Parser(argparse.ArgumentParser):
    """An argument parser that raises its complaint as ValueError."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Adds --config and --print-config."""
    parser.add_argument("--config", type=Path, help="TOML file of options; flags and VSTAR_* variables override it")
    parser.add_argument("--print-config", action="store_true", help="print the effective settings as TOML, and stop")


def layered(
    parser: argparse.ArgumentParser, argv: Sequence[str], environ: Mapping[str, str] = os.environ
) -> argparse.Namespace:
    """Parses `argv` on top of the environment and the configuration file; ValueError names the source of a bad value.

    A parser's default `settle` is a function that fills in defaults that depend on other settings.
    """
    early = Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    path = early.parse_known_args(argv)[0].config or environ.get(PREFIX + "CONFIG")
    actions = {a.dest: a for a in parser._actions if a.option_strings and a.dest not in ("help", "config", "print_config")}
    given = _on_the_line(parser, actions, argv)
    below: dict[str, Any] = {}
    if path:
        for key, value in _read_toml(Path(path)).items():
            dest = key.replace("-", "_")
            if dest not in actions:
                raise ValueError(f"{path}: unknown setting {key!r}; known ones: {', '.join(sorted(actions))}")
            below[dest] = _value(actions[dest], value, f"{path}: {key}")
    for dest, action in actions.items():
        # an empty variable is how Compose and CI leave one out
        if (text := environ.get(name := PREFIX + dest.upper())) and dest not in given:
            _check_service(name, text, action)
            _leave_one(below, {dest})
            below[dest] = _value(action, text.split("\n") if _is_list(action) else text, name)
    _leave_one(below, given)
    lists = {dest: value for dest, value in below.items() if _is_list(actions[dest])}
    parser.set_defaults(**{dest: value for dest, value in below.items() if dest not in lists})
    args = parser.parse_args(argv)
    for dest, value in lists.items():
        if getattr(args, dest) is None:  # argparse would add a flag's values to a default list
            setattr(args, dest, value)
    if settle := getattr(args, "settle", None):
        settle(args)
    return args


def _on_the_line(parser: argparse.ArgumentParser, actions: Mapping[str, argparse.Action], argv: Sequence[str]) -> set[str]:
    """Returns the settings that flags give, of which a variable's value does not matter."""
    defaults = {dest: parser.get_default(dest) for dest, action in actions.items() if not _is_list(action)}
    unset = object()
    parser.set_defaults(**dict.fromkeys(defaults, unset))
    try:
        found = vars(parser.parse_args(argv)).items()
    finally:
        parser.set_defaults(**defaults)
    changed = {dest for dest, value in found if dest not in defaults and value != parser.get_default(dest)}
    return changed | {dest for dest, value in found if dest in defaults and value is not unset}


def _leave_one(below: dict[str, Any], above: set[str]) -> None:
    """Drops what says in another way what a higher source says: states on the line replace a file's synopsis."""
    if above & ALTERNATIVES:
        for dest in ALTERNATIVES - above:
            below.pop(dest, None)


def _check_service(name: str, text: str, action: argparse.Action) -> None:
    if text.startswith(("tcp://", "udp://", "sctp://")):
        raise ValueError(
            f"{name} is {text!r}, which Kubernetes sets for a Service of the name {PREFIX[:-1].lower()}; "
            f"set enableServiceLinks: false for the pod, or give {action.option_strings[-1]}"
        )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"cannot read the configuration {path}: {error}") from error


def _is_list(action: argparse.Action) -> bool:
    return isinstance(action, argparse._ExtendAction | argparse._AppendAction)


def _value(action: argparse.Action, value: Any, where: str) -> Any:
    if _is_list(action):
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {value!r}")
        return [_scalar(action, item, where) for item in value]
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() not in known:
            raise ValueError(f"{where} must be true or false, got {value!r}")
        return known[str(value).lower()]
    return _scalar(action, value, where)


def _scalar(action: argparse.Action, value: Any, where: str) -> Any:
    if isinstance(value, bool | list | dict):
        raise ValueError(f"{where} must be a single value, got {value!r}")
    if action.type is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        converted = action.type(str(value)) if callable(action.type) else str(value)
    except (ValueError, argparse.ArgumentTypeError) as error:
        kind = {int: "a whole number", float: "a number"}.get(action.type)  # type: ignore[call-overload]
        raise ValueError(f"{where} must be {kind}, got {value!r}" if kind else f"{where}: {error}") from error
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"{where} must be one of {', '.join(map(str, action.choices))}, got {value!r}")
    return converted


def to_toml(args: argparse.Namespace) -> str:
    """Writes settings as TOML that `--config` reads back; unset ones are left out."""
    skipped = ("command", "run", "settle", "config", "print_config", "prompt", "verbose")
    lines = []
    for name, value in vars(args).items():
        if name not in skipped and value is not None:
            plain = value if isinstance(value, bool | int | float | str) else _plain(value)
            lines.append(f"{name.replace('_', '-')} = {json.dumps(plain, ensure_ascii=False)}\n")
    return "".join(lines).replace("\x7f", "\\u007f")  # the one character that JSON may hold and TOML may not


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list) else str(value)
