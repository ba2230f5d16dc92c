"""Precomputed embeddings of a synopsis, in a safetensors file; they replace the text tower."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vstar_engine.artifacts.files import write_aside
from vstar_engine.config.models import Spec
from vstar_engine.config.timeline import TIME
from vstar_engine.errors import CheckpointError

from .synopsis import Synopsis
from .tokenizer import tokenizer_hash

KIND, VERSION = "vstar-engine embeddings", 1
BATCH = 64

# texts -> (n, 77, C)
Encode = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True, eq=False)
class Embeddings:
    """A synopsis and its text embeddings: `anchors` (K, 77, C) and `negative` (1 or K, 77, C).

    Frames are interpolated when a video is made, so a bundle serves any number of frames. The hashes identify the text tower
    and the tokenizer that made it; `file` is where it was read from.
    """

    synopsis: Synopsis
    anchors: Tensor
    negative: Tensor
    negative_prompt: str
    text_hash: str
    tokenizer_hash: str
    file: str = ""

    def save(self, path: str | Path) -> Path:
        """Writes the bundle; the file is complete or absent."""
        path, synopsis = Path(path), self.synopsis
        about = {
            "version": VERSION,
            "prompt": synopsis.prompt,
            "states": synopsis.states,
            "synopsis_source": synopsis.source,
            "positions": synopsis.at,
            "durations": synopsis.durations,
            "negative": self.negative_prompt,
            "negatives": synopsis.negatives,
            "text_sha256": self.text_hash,
            "tokenizer_sha256": self.tokenizer_hash,
            "dtype": str(self.anchors.dtype)[6:],
        }
        tensors = {"anchors": self.anchors.contiguous(), "negative": self.negative.contiguous()}
        with write_aside(path) as aside:
            try:
                save_file(tensors, aside, {"kind": KIND, "about": json.dumps(about)})
            except SafetensorError as error:
                raise OSError(str(error)) from error
        return path

    @staticmethod
    def read(path: str | Path) -> "Embeddings":
        """Reads a bundle; CheckpointError for a file that is absent, truncated, of another version or kind, or not finite."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("kind") != KIND:
                    raise CheckpointError(f"{path} is no bundle of embeddings; make one with `vstar-engine embed`")
                about = json.loads(metadata["about"])
                if about["version"] != VERSION:
                    raise CheckpointError(f"{path} is a bundle of version {about['version']}; this engine reads {VERSION}")
                anchors, negative = file.get_tensor("anchors"), file.get_tensor("negative")
            bundle = _bundle(about, anchors, negative, str(path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a whole bundle of embeddings ({error})") from error
        except (ValueError, LookupError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is a damaged bundle of embeddings ({error})") from error
        bundle._check_tensors()
        return bundle

    def _check_tensors(self) -> None:
        count = len(self.synopsis.states)
        for name, tensor, rows in (("anchors", self.anchors, (count,)), ("negative", self.negative, (1, count))):
            if tensor.dim() != 3 or tensor.shape[0] not in rows or tensor.shape[1:] != self.anchors.shape[1:]:
                raise CheckpointError(f"{self.file}: {name} of {count} states cannot be {tuple(tensor.shape)}")
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise CheckpointError(f"{self.file}: {name} must be finite numbers")

    def check(self, spec: Spec, text_hash: str | None) -> None:
        """Raises CheckpointError unless the bundle fits a model and its text tower, whose hash may be unknown (None)."""
        name, wanted = self.file or "the bundle", (spec.text.context_length, spec.unet.context_dim)
        if tuple(self.anchors.shape[1:]) != wanted:
            raise CheckpointError(
                f"{name} holds embeddings of {tuple(self.anchors.shape[1:])}, model {spec.name} takes {wanted}"
            )
        for what, ours, its in (
            ("text tower", text_hash, self.text_hash),
            ("tokenizer", tokenizer_hash(spec.text), self.tokenizer_hash),
        ):
            if ours is not None and ours != its:
                raise CheckpointError(
                    f"{name} was made with another {what} ({its[:12]}) than these weights have ({ours[:12]}); embed it anew"
                )


def _bundle(about: dict[str, Any], anchors: Tensor, negative: Tensor, file: str) -> Embeddings:
    texts = [about["prompt"], *about["states"], about["negative"], *about["negatives"], about["text_sha256"]]
    if not about["states"] or not all(isinstance(text, str) for text in texts):
        raise ValueError("its states are no texts")
    times = [place for place in about["positions"] if isinstance(place, str) and TIME.fullmatch(place)]
    if not all(isinstance(number, int | float) for number in (*about["positions"], *about["durations"]) if number not in times):
        raise ValueError("its positions are no numbers")
    synopsis = Synopsis(
        about["prompt"],
        tuple(about["states"]),
        str(about["synopsis_source"]),
        tuple(about["positions"]),
        tuple(about["durations"]),
        tuple(about["negatives"]),
    )
    return Embeddings(
        synopsis, anchors, negative, about["negative"], about["text_sha256"], str(about["tokenizer_sha256"]), file
    )


def check_batch(batch: int) -> None:
    """Raises ValueError for a batch size below 1."""
    if batch < 1:
        raise ValueError(f"a batch holds at least 1 text, got {batch}")


def embed(
    synopses: Iterable[Synopsis],
    encode: Encode,
    text_hash: str,
    tokenizer: str | None = None,
    *,
    negative: str = "",
    batch: int = BATCH,
    dtype: torch.dtype = torch.float16,
) -> Iterator[Embeddings]:
    """Yields a bundle for each synopsis, encoding `batch` texts at a time; `negative` is for states without one.

    Holds one batch of synopses in memory, so their number is not limited.
    """
    check_batch(batch)
    plain = encode([negative]).to("cpu", dtype)
    waiting: list[Synopsis] = []
    texts: dict[str, None] = {}

    def made() -> Iterator[Embeddings]:
        every = list(texts)
        rows = [row for i in range(0, len(every), batch) for row in encode(every[i : i + batch]).to("cpu", dtype)]
        known = dict(zip(every, rows, strict=True))
        for synopsis in waiting:
            anchors = torch.stack([known[text] for text in synopsis.states])
            negatives = torch.stack([known[text] for text in synopsis.negatives]) if synopsis.negatives else plain
            said, _ = synopsis.unwanted(negative)
            yield Embeddings(synopsis, anchors, negatives, said, text_hash, tokenizer or tokenizer_hash())

    for given in synopses:
        synopsis = replace(given, negatives=given.unwanted(negative)[1])
        waiting.append(synopsis)
        texts |= dict.fromkeys((*synopsis.states, *synopsis.negatives))
        if len(texts) >= batch:
            yield from made()
            waiting, texts = [], {}
    yield from made()
