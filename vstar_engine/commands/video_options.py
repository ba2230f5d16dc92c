"""The settings of a video on the command line: options made from the table, their values, and back."""

import argparse
from collections.abc import Callable, Collection, Mapping
from typing import Any

from vstar_engine.config.models import MODELS
from vstar_engine.config.request import Clip
from vstar_engine.config.sampling import FEW_STEP, Tar, tar_of
from vstar_engine.config.streamed import TAR_PRESET
from vstar_engine.config.video_fields import BODY, TAR, VIDEO_FIELDS, VideoField, clip_from, fields_at, unchanged

from .model_options import add_fast_option, fast_from, own_defaults

FAST_PATH, TAR_PATH = "sampling.fast", "tar"


def checked(parse: Callable[[str], object]) -> Callable[[str], str]:
    """Returns an option type that checks text but keeps it, so that settings print as they were given."""

    def check(text: str) -> str:
        try:
            parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return check


def answered(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Returns an option type that reads text and says what it expects of it."""

    def answer(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return answer


def add_video_options(parser: argparse.ArgumentParser, only: Collection[str] | None = None) -> None:
    """Adds an option for each setting, or for those at the paths `only`; defaults come from the dataclasses."""
    for row in VIDEO_FIELDS:
        if row.path == FAST_PATH and only is None:
            add_fast_option(parser)
        elif only is None or row.path in only:
            add_option(parser, row)


def add_http_options(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each setting that a server takes; the server fills in those left out."""
    for row in VIDEO_FIELDS:
        if row.place is not None and row.settable:
            add_option(parser, row, defaults=False)


def add_option(parser: argparse.ArgumentParser, row: VideoField, defaults: bool = True) -> None:
    """Adds the option of a setting; without `defaults` it defaults to None."""
    default, said = row.default() if defaults and not row.many else None, row.help
    how: dict[str, Any] = {"default": None if row.follows_fast or row.path == TAR_PATH else default}
    # what a model alone may be asked for is no server's setting
    read = answered(row.read) if row.read and defaults else row.value_type
    if row.value_type is bool:
        how["action"] = argparse.BooleanOptionalAction
    else:
        how |= {"type": checked(row.parse) if row.parse else read, "metavar": row.metavar}
        how |= {"action": "extend", "nargs": "+"} if row.many else {}
        if default not in (None, ""):
            least = f", with --fast {FEW_STEP} {row.default((FEW_STEP,))}" if row.follows_fast else ""
            said += f" (default {default}{least})"
    parser.add_argument(f"--{row.option}", help=said.replace("%", "%%"), **how)


def settle(args: argparse.Namespace) -> None:
    """Fills in the defaults that depend on --fast and on the model."""
    (fast, _), own = fast_from(args), own_defaults(args)
    spec = MODELS.get(getattr(args, "model", None) or "")
    for row in VIDEO_FIELDS:
        if (row.follows_fast or row.path == TAR_PATH) and getattr(args, row.attribute, 0) is None:
            unregularised = row.path == TAR_PATH and spec is not None and spec.streaming is not None
            setattr(args, row.attribute, TAR_PRESET if unregularised else row.default(fast, own))


def value_of(row: VideoField, args: argparse.Namespace) -> Any:
    """Returns the parsed value of a setting's option; None, or an empty tuple, when it was left out."""
    text, parse = getattr(args, row.attribute), row.parse or unchanged
    if row.many:
        return tuple(map(parse, text or ()))
    return None if text is None else parse(text)


def clip_of(args: argparse.Namespace) -> Clip:
    """Returns the clip that options ask for."""
    apart = ("states", FAST_PATH)
    values = {row.path: value_of(row, args) for row in VIDEO_FIELDS if row.place != TAR and row.path not in apart}
    return clip_from({**values, FAST_PATH: fast_from(args)[0], "tar": tar_from(args)})


def tar_from(args: argparse.Namespace) -> Tar | None:
    """Returns the preset with single settings on top of it."""
    given = {row.name: value_of(row, args) for row in fields_at(TAR) if row.path != "tar.until_step"}
    return tar_of(given.pop("tar"), dict(given.pop("sigma")), args.until, args.steps, **given)


def http_from(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of a body, except its states, that options set."""
    body: dict[str, Any] = {}
    for row in fields_at(BODY):
        if row.settable and (value := value_of(row, args)) is not None:
            body[row.http_name] = row.to_http(value)
    return {**body, "tar": tar} if (tar := _http_tar(args)) else body


def _http_tar(args: argparse.Namespace) -> dict[str, Any]:
    given = {row.http_name: value_of(row, args) for row in fields_at(TAR)}
    given["sigma"] = {str(level): sigma for level, sigma in given["sigma"]} or None
    if args.until is not None and args.until.endswith("%"):  # a share of steps that the server knows
        given["until"] = args.until
    return {name: value for name, value in given.items() if value is not None}


def words_of(request: Mapping[str, Any], without: Collection[str] = ()) -> list[str]:
    """Returns the options that reproduce the request in a file's provenance, except those at paths of `without`."""
    words: list[str] = []
    for row in VIDEO_FIELDS:
        if row.path not in without:
            words += _words(row, request)
    return words


def _words(row: VideoField, request: Mapping[str, Any]) -> list[str]:
    if row.path == "tar":  # its levels follow one by one
        return ["--tar=none"]
    value: Any = request
    for part in row.path.split("."):  # a file of an earlier version may lack some
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        return []
    if isinstance(value, bool):
        return [] if value == row.default() else [f"--{'' if value else 'no-'}{row.option}"]
    values = value.items() if isinstance(value, Mapping) else value if row.many else [value]
    return [f"--{row.option}={row.spell(one)}" for one in values]
