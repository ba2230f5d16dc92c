"""CLIP's byte-pair tokenizer."""

import gzip
import hashlib
import html
import logging
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vstar_engine.artifacts.files import digest_of
from vstar_engine.config.models import OPENCLIP, TextSpec
from vstar_engine.errors import MissingLibrary

if TYPE_CHECKING:
    from tokenizers import Tokenizer


log = logging.getLogger(__name__)


START, END = 49406, 49407


CONTEXT_LENGTH = 77
# what the start and end tokens are called, which a prompt that says them gets
OPENCLIP_SPECIAL = ("<start_of_text>", "<end_of_text>")
TRANSFORMERS_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _merges() -> str:
    return gzip.decompress(files("vstar_engine").joinpath("data/clip_merges.txt.gz").read_bytes()).decode()


@cache
def tokenizer_hash(spec: TextSpec | None = None) -> str:
    """Returns the sha256 of what makes tokens of a prompt: the merges table and, where they are not OpenCLIP's, the rules."""
    merges = hashlib.sha256(_merges().encode()).hexdigest()
    return merges if spec is None or spec.tokenizer == OPENCLIP else digest_of([merges, spec.tokenizer, spec.pad])


@cache
def merges() -> list[tuple[str, str]]:
    """Returns CLIP's 48,894 merges of two tokens, in order."""
    size = END + 1 - 2 - 2 * 256
    return [(a, b) for a, b in (line.split() for line in _merges().split("\n")[1 : size + 1])]


def vocabulary(special: tuple[str, str]) -> dict[str, int]:
    """Returns CLIP's 49,408 tokens and their numbers; the last two are called `special`."""
    letters = _byte_letters()
    words = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in merges()]
    return {word: i for i, word in enumerate([*words, *special])}


@cache
def _tokenizer(special: tuple[str, str] = OPENCLIP_SPECIAL, pad: int = END) -> "Tokenizer":
    """Builds CLIP's byte-pair tokenizer from the merges table that lies in the package.

    A prompt that says a special token, or the token that pads, gets its number.
    """
    try:
        from tokenizers import AddedToken, Regex, Tokenizer
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    except ImportError as error:
        raise MissingLibrary(f"reading prompts needs the tokenizers package ({error})") from error

    tokens = vocabulary(special)
    tokenizer = Tokenizer(BPE(tokens, merges(), end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(WORDS), "removed", invert=True), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    padding = next(word for word, number in tokens.items() if number == pad)
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in dict.fromkeys((*special, padding))])
    if special == TRANSFORMERS_SPECIAL:
        tokenizer.normalizer = _transformers_cleaning()
    return tokenizer


def _transformers_cleaning() -> Any:
    """Returns how transformers cleans a prompt: composed letters, folded white space, lower case."""
    from tokenizers import Regex
    from tokenizers.normalizers import NFC, Lowercase, Replace, Sequence

    return Sequence([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])


def _byte_letters() -> list[str]:
    """Lists the 256 printable stand-ins for bytes in CLIP's vocabulary order: printable bytes first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def clean(prompt: str) -> str:
    """Fixes broken text, unescapes HTML twice, folds white space and lower-cases, as CLIP's tokenizer does."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return " ".join(text.split()).strip().lower()


def _words(prompt: str, spec: TextSpec) -> list[int]:
    """Returns the tokens of a prompt without start, end and padding."""
    if spec.tokenizer == OPENCLIP:
        return _tokenizer().encode(clean(prompt)).ids
    return _tokenizer(TRANSFORMERS_SPECIAL, spec.pad).encode(prompt).ids


def tokenize(prompts: Sequence[str], spec: TextSpec | None = None) -> Tensor:
    """Returns CLIP's byte-pair tokens, (n, 77) int64: 49406, the words, 49407, padding; a long prompt keeps its end token.

    `spec` says how prompts are cleaned and padded, by default as OpenCLIP does, with zeros.
    """
    spec = spec or TextSpec()
    tokens = torch.full((len(prompts), CONTEXT_LENGTH), spec.pad, dtype=torch.int64)
    for number, (row, prompt) in enumerate(zip(tokens, prompts, strict=True), 1):
        words = _words(prompt, spec)
        if len(words) > CONTEXT_LENGTH - 2:
            cut = len(words) - (CONTEXT_LENGTH - 2)
            said = "text %d of %d has more than %d tokens; its last %d are not read"
            log.warning(said, number, len(prompts), CONTEXT_LENGTH - 2, cut)
            words = words[: CONTEXT_LENGTH - 2]
        row[: len(words) + 2] = torch.tensor([START, *words, END])
    return tokens
