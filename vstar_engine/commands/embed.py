"""The `embed` command: encodes prompts to one file or a folder of embeddings, with the text tower alone."""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vstar_engine.artifacts.files import check_writable
from vstar_engine.errors import CheckpointError, OutputError
from vstar_engine.loading import check_machine, load_text, open_weights
from vstar_engine.machine.device import DTYPES, dtype_named
from vstar_engine.model_choice import ModelChoice
from vstar_engine.prompting.embeddings import BATCH, VERSION, Embeddings, check_batch, embed
from vstar_engine.prompting.synopsis import Synopsis
from vstar_engine.prompting.tokenizer import tokenize, tokenizer_hash
from vstar_engine.weights.checkpoint import text_hash

from .model_options import add_text_options
from .option_sources import add_config_options
from .prompt_options import add_llm_options, prompts_given, synopses
from .video_options import add_video_options
from .weights_options import with_weights

SUFFIX, INDEX = ".safetensors", "index.jsonl"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `embed`."""
    parser.add_argument("prompt", nargs="*", help="what each video shows")
    parser.add_argument("--synopsis", metavar="FILE", help="synopses as `synopsis` writes them")
    parser.add_argument("--prompts", metavar="FILE", help="file with a prompt or a JSON synopsis on each line")
    add_video_options(parser, ("states", "negative"))
    parser.add_argument(
        "--out",
        default="embeddings",
        help=f"a {SUFFIX} file for one bundle, or a folder; a folder is resumed (default %(default)s)",
    )
    parser.add_argument("--stored-as", default="float16", help=f"dtype of the file: {', '.join(DTYPES)} (default %(default)s)")
    parser.add_argument("--batch", type=int, default=BATCH, help="texts in one call of the text tower (default %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    add_text_options(parser)
    add_llm_options(parser)
    add_config_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs `embed`."""
    check_batch(args.batch)
    out, stored = Path(args.out), dtype_named(args.stored_as)
    choice = ModelChoice(args.model, args.weights, device=args.device, dtype=args.dtype)
    device, dtype = check_machine(choice)
    given = synopses(args, prompts_given(args), args.state_count)
    if out.suffix == SUFFIX:
        check_writable(out, args.force)
        few = list(islice(given, 2))
        if len(few) != 1:
            number = "more prompts" if few else "no prompt"
            raise ValueError(f"one file holds one bundle, but there are {number}; {out} can be a folder instead")
        given = iter(few)
    choice = with_weights(choice, args.yes)
    spec = choice.spec
    tensors = open_weights(spec, choice.weights)
    identity = text_hash(tensors, spec.text)
    if identity is None:
        raise CheckpointError(f"{tensors.path} holds no text tower to embed with")
    tower, _ = load_text(spec, tensors, device, dtype)

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> Tensor:
        return tower(tokenize(texts, spec.text).to(device))

    def bundles(wanted: Iterator[Synopsis]) -> Iterator[Embeddings]:
        how = tokenizer_hash(spec.text)
        return embed(wanted, encode, identity, how, negative=args.negative, batch=args.batch, dtype=stored)

    if out.suffix == SUFFIX:
        for bundle in bundles(given):
            bundle.save(out)
            print(f"wrote {out}: {len(bundle.anchors)} states, {out.stat().st_size / 1024:.0f} KiB")
        return 0
    with Index(out, identity, args.stored_as, args.negative) as index:
        for bundle in tqdm(bundles(index.missing(given)), desc="embed", unit="bundle", file=sys.stderr, disable=None):
            index.add(bundle)
        print(f"wrote {out}: {index.made} new bundles, {index.kept} were there")
    return 0


class Index:
    """A folder of bundles and its index; a run that was interrupted continues where it stopped."""

    def __init__(self, folder: Path, *shared: str):
        self.folder, self.shared = folder, shared
        self.made = self.kept = 0
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / INDEX).open("a+", encoding="utf-8", errors="backslashreplace")
        self._listed = self._read()

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self) -> set[bytes]:
        """Returns the listed names, and removes an unfinished last line."""
        listed = set()
        self._file.seek(0)
        end = 0
        for line in iter(self._file.readline, ""):
            try:
                if not line.endswith("\n"):
                    break
                listed.add(_key(json.loads(line)["file"]))
            except (ValueError, LookupError, TypeError):
                break
            end = self._file.tell()
        self._file.truncate(end)
        return listed

    def name(self, synopsis: Synopsis) -> str:
        """Returns the file name of a bundle, a hash of everything that decides its content."""
        made_of = [VERSION, *self.shared, synopsis.prompt, synopsis.source]
        made_of += [synopsis.states, synopsis.at, synopsis.durations, synopsis.negatives]
        digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
        return f"{digest[:2]}/{digest}{SUFFIX}"

    def missing(self, synopses: Iterator[Synopsis]) -> Iterator[Synopsis]:
        """Yields the synopses that have no bundle yet, each once."""
        for given in synopses:
            synopsis = replace(given, negatives=given.unwanted(self.shared[-1])[1])
            name = self.name(synopsis)
            there, known = (self.folder / name).is_file(), _key(name) in self._listed
            if not there:
                yield synopsis
            self.kept += there
            if there and not known:
                self._list(synopsis)

    def add(self, bundle: Embeddings) -> None:
        """Writes a bundle, then lists it."""
        path = self.folder / self.name(bundle.synopsis)
        with _writing(path):
            path.parent.mkdir(exist_ok=True)
        bundle.save(path)
        self.made += 1
        if _key(path.name) not in self._listed:
            self._list(bundle.synopsis)

    def _list(self, synopsis: Synopsis) -> None:
        name = self.name(synopsis)
        entry = {"file": name, "prompt": synopsis.prompt, "states": len(synopsis.states)}
        with _writing(self.folder / INDEX):
            self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self._file.flush()
        self._listed.add(_key(name))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def _key(name: str) -> bytes:
    return bytes.fromhex(Path(name).stem)
