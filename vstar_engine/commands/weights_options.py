"""Weights of a command: downloaded after a yes, and converted with a bar, before anything loads them."""

import argparse
import sys

from tqdm import tqdm

from vstar_engine.config.model_sources import SOURCES
from vstar_engine.errors import CheckpointError
from vstar_engine.model_choice import ModelChoice
from vstar_engine.weights.sources import GB, Offer, OnProgress, hub_id, present

YES = ("y", "yes")


def add_yes_option(parser: argparse.ArgumentParser) -> None:
    """Adds --yes."""
    parser.add_argument("--yes", action="store_true", help="download weights without asking")


def with_weights(choice: ModelChoice, yes: bool) -> ModelChoice:
    """Returns a choice whose weights are on this machine, downloaded after a yes; CheckpointError where nobody says it."""
    id = None if choice.engine is not None else hub_id(choice.weights, choice.model)
    if id is not None and not yes and present(choice.weights, choice.model, choice.dtype) is None and not sys.stdin.isatty():
        known = SOURCES.get(choice.model)
        about = f", about {known.bytes / GB:.1f} GB; licence: {known.licence}" if known and known.id == id.id else ""
        named = choice.model if choice.weights is None else choice.weights
        said = f"model {choice.model} comes without weights" if choice.weights is None else f"{id} is not on this machine"
        raise CheckpointError(f"{said} ({id}{about}); fetch them with `vstar-engine pull {named}`, or give --yes")
    with conversion_bar() as on_progress:
        return choice.located(agree if yes else question, on_progress)


def agree(offer: Offer) -> None:
    """Says what is downloaded."""
    print(offer, file=sys.stderr)


def question(offer: Offer) -> None:
    """Asks on the terminal whether to download; CheckpointError for any answer but yes."""
    print(f"{offer}\nDownload it? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in YES:
        raise CheckpointError(f"{offer.id} was not downloaded, as nobody said yes")


class conversion_bar:
    """Shows a conversion's progress on a terminal."""

    def __enter__(self) -> OnProgress:
        self.bar: tqdm | None = None
        return self.show

    def show(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = tqdm(desc="convert", unit="tensor", total=total, file=sys.stderr, disable=None)
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
