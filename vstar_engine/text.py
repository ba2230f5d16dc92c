"""Prompts to conditioning: CLIP tokens, the OpenCLIP text tower, and anchors spread over the frames (VSP)."""

import gzip
import hashlib
import html
import logging
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vstar_engine.config.models import TextSpec
from vstar_engine.config.timeline import SPREAD_MODES, anchor_frames, check_anchors

from .errors import MissingLibrary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

START, END = 49406, 49407
CONTEXT_LENGTH = 77


def _merges() -> str:
    return gzip.decompress(files("vstar_engine").joinpath("data/clip_merges.txt.gz").read_bytes()).decode()


@cache
def tokenizer_hash() -> str:
    """Names the tokenizer by the sha256 of its merges table."""
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
    """Mends broken text, undoes HTML escapes twice, folds white space and lower-cases, as CLIP's tokenizer does."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return " ".join(text.split()).strip().lower()


def tokenize(prompts: Sequence[str]) -> Tensor:
    """Gives CLIP's byte-pair tokens, (n, 77) int64: 49406, the words, 49407, zeros; a long prompt keeps its end token."""
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


class Attention(nn.Module):
    """Causal self-attention with OpenCLIP's parameter names."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (n, heads, 77, head_dim)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.ln_2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, spec: TextSpec):
        super().__init__()
        # the penultimate layer's output is wanted, so the last block is never built
        self.resblocks = nn.Sequential(*(ResidualAttentionBlock(spec.width, spec.heads) for _ in range(spec.layers - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class TextTower(nn.Module):
    """OpenCLIP's text transformer up to its penultimate layer, then the final norm; no projection."""

    def __init__(self, spec: TextSpec):
        super().__init__()
        self.spec = spec
        # keys of the official tower that text-to-video does not need
        self.unused = (f"transformer.resblocks.{spec.layers - 1}.", "text_projection", "logit_scale")
        self.token_embedding = nn.Embedding(spec.vocab_size, spec.width)
        self.positional_embedding = nn.Parameter(torch.empty(spec.context_length, spec.width))
        self.transformer = Transformer(spec)
        self.ln_final = nn.LayerNorm(spec.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, 77) int -> (n, 77, width)."""
        return self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding))


def spread(anchors: Tensor, frames: int, mode: str = "linear", at: Sequence[int] | None = None) -> Tensor:
    """Spreads K state embeddings (K, 77, C) over the frames (VSP): (frames, 77, C).

    `linear` interpolates between neighbours; `ease` leaves and reaches each anchor gently (3 w^2 - 2 w^3); `hold` keeps each
    anchor until the next one's frame, the last to the end. `at` names the anchors' frames: ascending from 0, the last being
    frames-1 unless they hold. Raises ValueError for more anchors than frames, a bad `at` or mode.
    """
    count = len(anchors)
    if not 1 <= count <= frames:
        raise ValueError(f"there must be 1 to {frames} states for {frames} frames, got {count}")
    if mode not in SPREAD_MODES:
        raise ValueError(f"mode must be one of {', '.join(SPREAD_MODES)}, got {mode!r}")
    where = anchor_frames(count, frames) if at is None else list(at)
    check_anchors(where, count, frames, mode)
    rows = []
    for i, (start, end) in enumerate(pairwise(where)):
        weight = torch.linspace(0, 1, end - start + 1, dtype=torch.float32, device=anchors.device)[:-1]
        if mode == "hold":
            weight = torch.zeros_like(weight)
        elif mode == "ease":
            weight = weight * weight * (3 - 2 * weight)
        weight = weight.to(anchors.dtype)[:, None, None]
        rows.append(anchors[i] * (1 - weight) + anchors[i + 1] * weight)
    return torch.cat([*rows, anchors[-1:].expand(frames - where[-1], *anchors.shape[1:])])
