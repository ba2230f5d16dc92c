"""CLIP's byte-pair tokenizer."""

import gzip
import hashlib
import html
import logging
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vstar_engine.errors import MissingLibrary

if TYPE_CHECKING:
    from tokenizers import Tokenizer


log = logging.getLogger(__name__)


START, END = 49406, 49407


CONTEXT_LENGTH = 77


def _merges() -> str:
    return gzip.decompress(files("vstar_engine").joinpath("data/clip_merges.txt.gz").read_bytes()).decode()


@cache
def tokenizer_hash() -> str:
    """Returns the sha256 of the tokenizer's merges table."""
    return hashlib.sha256(_merges().encode()).hexdigest()


@cache
def _tokenizer() -> "Tokenizer":
    """Builds CLIP's byte-pair tokenizer from the merges table that lies in the package."""
    try:
        from tokenizers import AddedToken, Regex, Tokenizer
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    except ImportError as error:
        raise MissingLibrary(f"reading prompts needs the tokenizers package ({error})") from error

    size = END + 1 - 2 - 2 * 256
    merges = [(a, b) for a, b in (line.split() for line in _merges().split("\n")[1 : size + 1])]
    letters = _byte_letters()
    words = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in merges]
    vocabulary = {word: i for i, word in enumerate([*words, "<start_of_text>", "<end_of_text>"])}
    tokenizer = Tokenizer(BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(pattern), "removed", invert=True), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in ("<start_of_text>", "<end_of_text>")])
    return tokenizer


def _byte_letters() -> list[str]:
    """Lists the 256 printable stand-ins for bytes in CLIP's vocabulary order: printable bytes first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def clean(prompt: str) -> str:
    """Fixes broken text, unescapes HTML twice, folds white space and lower-cases, as CLIP's tokenizer does."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return " ".join(text.split()).strip().lower()


def tokenize(prompts: Sequence[str]) -> Tensor:
    """Returns CLIP's byte-pair tokens, (n, 77) int64: 49406, the words, 49407, zeros; a long prompt keeps its end token."""
    tokens = torch.zeros(len(prompts), CONTEXT_LENGTH, dtype=torch.int64)
    for number, (row, prompt) in enumerate(zip(tokens, prompts, strict=True), 1):
        words = _tokenizer().encode(clean(prompt)).ids
        if len(words) > CONTEXT_LENGTH - 2:
            cut = len(words) - (CONTEXT_LENGTH - 2)
            said = "text %d of %d has more than %d tokens; its last %d are not read"
            log.warning(said, number, len(prompts), CONTEXT_LENGTH - 2, cut)
            words = words[: CONTEXT_LENGTH - 2]
        row[: len(words) + 2] = torch.tensor([START, *words, END])
    return tokens
