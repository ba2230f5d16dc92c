"""A tokenizer's folder of transformers: held to CLIP's tables, and the token that it pads with."""

from pathlib import Path
from typing import Any

from vstar_engine.errors import CheckpointError
from vstar_engine.prompting.tokenizer import CONTEXT_LENGTH, END, TRANSFORMERS_SPECIAL, merges, vocabulary

from .diffusers_config import Settings
from .diffusers_files import MERGES, SPECIAL_TOKENS, TOKENIZER_CONFIG, VOCABULARY, WHOLE_TOKENIZER


def padding_token(folder: Path) -> int:
    """Returns the number of the token that pads; CheckpointError unless the tokenizer is CLIP's, token by token.

    The map of special tokens goes before the configuration, but where that lists the added tokens, as transformers has it.
    """
    added = _check_tables(folder)
    pad: Any = TRANSFORMERS_SPECIAL[1]
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        if not (folder / name).is_file():
            continue
        given = Settings(folder / name)
        length = given.take("model_max_length", CONTEXT_LENGTH)
        if length != CONTEXT_LENGTH:
            raise CheckpointError(f"{folder / name}: model_max_length must be {CONTEXT_LENGTH}, got {length}")
        given.hold({"add_prefix_space": False})
        for key, wanted in zip(("bos_token", "eos_token"), TRANSFORMERS_SPECIAL, strict=True):
            if (said := _content(given.pop(key, wanted))) != wanted:
                raise CheckpointError(f"{folder / name}: {key} must be {wanted}, got {said!r}")
        pad = _content(given.pop("pad_token", pad))
        if listed := given.pop("added_tokens_decoder", None):
            added |= {_content(token): int(number) for number, token in listed.items()}
            break
    known = vocabulary(TRANSFORMERS_SPECIAL)
    if pad not in known:
        raise CheckpointError(f"{folder}: the padding token {pad!r} is none of CLIP's {END + 1} tokens")
    for text, number in added.items():
        if known.get(text) != number or text not in (*TRANSFORMERS_SPECIAL, pad):
            raise CheckpointError(f"{folder} adds the token {text!r} to CLIP's, which is not computed here")
    return known[pad]


def _content(token: Any) -> Any:
    """Returns the text of a token, which some versions write with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def _check_tables(folder: Path) -> dict[str, int]:
    """Returns the tokens that are added to the tables; CheckpointError unless vocabulary and merges are CLIP's."""
    added = {}
    if (folder / WHOLE_TOKENIZER).is_file():
        given = Settings(folder / WHOLE_TOKENIZER)
        added = {_content(token): token.get("id") for token in given.pop("added_tokens", None) or ()}
        model = given.pop("model", None) or {}
        words, pairs = model.get("vocab"), model.get("merges") or ()
        # until tokenizers 0.20 a merge was one text
        found = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs]
    elif (folder / VOCABULARY).is_file() and (folder / MERGES).is_file():
        words = Settings(folder / VOCABULARY).every()
        lines = (folder / MERGES).read_text(encoding="utf-8").split("\n")
        found = [tuple(line.split()) for line in lines[1:] if line.strip()]
    else:
        raise CheckpointError(f"{folder} holds neither {WHOLE_TOKENIZER} nor {VOCABULARY} with {MERGES}")
    if words != vocabulary(TRANSFORMERS_SPECIAL) or found != merges():
        raise CheckpointError(f"{folder} is not CLIP's tokenizer: its vocabulary or merges differ, so prompts would be misread")
    return added
