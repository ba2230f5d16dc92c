"""Synopses, the states a video passes through: given, read from a file, or made from a prompt."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vstar_engine.artifacts.text_file import open_text, read_text, unreadable
from vstar_engine.config.timeline import Position
from vstar_engine.errors import EndpointError

from . import rules
from .json_text import parse_json
from .llm import MOST, Llm
from .synopsis_entry import GIVEN, fields_of

log = logging.getLogger(__name__)

# where a synopsis came from, besides GIVEN
PROMPT, LLM, OFFLINE = "prompt", "llm", "offline"
ONE_A_LINE = (".jsonl", ".ndjson")
# what begins so is JSON, though it may not parse
MEANT_AS_JSON = re.compile(r'\s*(\{\s*(["}]|$)|\[\s*["\[{\]])')


@dataclass(frozen=True)
class Synopsis:
    """A prompt and its states in order, at least one.

    `at` or `durations` place the states and `negatives` are their negative prompts; each is empty or has one for each state.
    """

    prompt: str
    states: tuple[str, ...]
    source: str = GIVEN
    at: tuple[Position, ...] = ()
    durations: tuple[float, ...] = ()
    negatives: tuple[str, ...] = ()

    def unwanted(self, negative: str) -> tuple[str, tuple[str, ...]]:
        """Returns the negative prompt of the whole video, or one for each state with `negative` for those without."""
        return ("", tuple(own or negative for own in self.negatives)) if self.negatives else (negative, ())

    def entry(self) -> dict[str, Any]:
        """Returns the synopsis as an entry of a synopsis file."""
        states: list[Any] = list(self.states)
        for name, values in (("at", self.at), ("duration", self.durations), ("negative", self.negatives)):
            if values:
                states = [state if isinstance(state, dict) else {"text": state} for state in states]
                for state, value in zip(states, values, strict=False):
                    state[name] = value
        return {"prompt": self.prompt, "subprompts": states, "synopsis_source": self.source}


def synopsis_of(entry: object, where: str) -> Synopsis:
    """Makes a synopsis of a JSON object; ValueError says what is wrong with it."""
    return Synopsis(**fields_of(entry, where))


def synopsize(
    prompt: str, count: int | None = None, most: int = MOST, llm: Llm | None = None, required: bool = False
) -> Synopsis:
    """Turns a prompt into states: `count` of them, or as many as it needs and at most `most`.

    Asks `llm`. Without one, or with a warning when it fails, applies the offline rules; a prompt that fits none becomes the
    only state. Raises EndpointError when `llm` fails and is `required`.
    """
    if count is not None and count < 1:
        raise ValueError(f"a synopsis has at least 1 state, got {count}")
    most = count or min(most, MOST)
    if most == 1:
        return Synopsis(prompt, (prompt,), PROMPT)
    if llm is not None and prompt.strip():
        try:
            return Synopsis(prompt, llm.states(prompt, count, most), LLM)
        except EndpointError as error:
            if required:
                raise
            log.warning("%s; the offline rules serve instead", error)
    states = thin(rules.states(prompt), most)
    if count is not None and len(states) < count:
        log.warning("the offline rules know %d states for this prompt, not %d: %.60s", len(states), count, prompt)
    return Synopsis(prompt, states, PROMPT if states == (prompt,) else OFFLINE)


def thin(states: Sequence[str], most: int) -> tuple[str, ...]:
    """Returns at most `most` (2 or more) of the states, evenly chosen, with the first and the last."""
    if len(states) <= most:
        return tuple(states)
    return tuple(states[round(i * (len(states) - 1) / (most - 1))] for i in range(most))


def read_synopses(path: str | Path) -> list[Synopsis]:
    """Reads a file of synopses.

    JSON: one {"prompt": ..., "subprompts": [...]} object or a list of them, each a video; in a .jsonl or .ndjson file an object
    a line. A subprompt is text or {"text": ..., "at": ..., "duration": ..., "negative": ...}; null is "not given". Plain text:
    one state a line, all of them one video; it may begin with a bracket. Raises ValueError when the file is absent, empty or
    neither.
    """
    path = Path(path)
    if path.suffix.lower() in ONE_A_LINE:
        entries = list(read_prompts(path))
        if not entries or not all(isinstance(entry, Synopsis) for entry in entries):
            raise ValueError(f"{path} must hold a JSON synopsis on every line")
        return [entry for entry in entries if isinstance(entry, Synopsis)]
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the synopsis {path}: {unreadable(error)}") from error
    if path.suffix.lower() != ".json" and not _is_json(text):
        lines = tuple(line.strip() for line in text.split("\n") if line.strip())
        if not lines:
            raise ValueError(f"{path} holds no states; give one a line")
        return [Synopsis(lines[0], lines)]
    content = parse_json(text, str(path))
    entries = content if isinstance(content, list) else [content]
    if not entries:
        raise ValueError(f"{path} holds an empty list of synopses")
    return [synopsis_of(entry, str(path)) for entry in entries]


def read_prompts(path: str | Path) -> Iterator[str | Synopsis]:
    """Reads a file line by line, however long it is: each line a prompt, or a synopsis as a JSON object."""
    try:
        with open_text(Path(path)) as file:
            for number, line in enumerate(file, 1):
                if line.lstrip().startswith("{") and _is_json(line):
                    where = f"{path}, line {number}"
                    yield synopsis_of(parse_json(line, where), where)
                elif line.strip():
                    yield line.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts {path}: {unreadable(error)}") from error


def _is_json(text: str) -> bool:
    """Returns whether text was meant as JSON: a prompt such as "[winter:spring:0.5] a hill" begins with a bracket too."""
    if MEANT_AS_JSON.match(text):
        return True
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False
