"""Synopses, the states a video passes through: given, read from a file, or made from a prompt."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vstar_engine.config.timeline import Position, parse_position
from vstar_engine.errors import EndpointError

from . import rules
from .llm import MOST, Llm

log = logging.getLogger(__name__)

# where a synopsis came from
GIVEN, PROMPT, LLM, OFFLINE = "given", "prompt", "llm", "offline"


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

    JSON: one {"prompt": ..., "subprompts": [...]} object or a list of them, each a video; in a .jsonl file an object a line.
    A subprompt is text or {"text": ..., "at": ..., "duration": ..., "negative": ...}. Plain text: one state a line, all of
    them one video. Raises ValueError when the file is absent, empty or of another form.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        entries = list(read_prompts(path))
        if not entries or not all(isinstance(entry, Synopsis) for entry in entries):
            raise ValueError(f"{path} must hold a JSON synopsis on every line")
        return [entry for entry in entries if isinstance(entry, Synopsis)]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the synopsis {path}: {error}") from error
    if not text.lstrip().startswith(("{", "[")):
        lines = tuple(line.strip() for line in text.splitlines() if line.strip())
        if not lines:
            raise ValueError(f"{path} holds no states; give one a line")
        return [Synopsis(lines[0], lines)]
    content = _json(text, str(path))
    entries = content if isinstance(content, list) else [content]
    if not entries:
        raise ValueError(f"{path} holds an empty list of synopses")
    return [_synopsis(entry, str(path)) for entry in entries]


def read_prompts(path: str | Path) -> Iterator[str | Synopsis]:
    """Reads a file line by line, however long it is: each line a prompt, or a synopsis as a JSON object."""
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.lstrip().startswith("{"):
                    where = f"{path}, line {number}"
                    yield _synopsis(_json(line, where), where)
                elif line.strip():
                    yield line.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts {path}: {error}") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} looks like JSON but is not ({error})") from error


def _synopsis(entry: object, where: str) -> Synopsis:
    subprompts = entry.get("subprompts") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(subprompts, list):
        raise _not_one(entry, where)
    if not subprompts:
        raise ValueError(f"{where}: the synopsis of {str(entry.get('prompt', ''))[:80]!r} has no subprompts")
    states = [{"text": state} if isinstance(state, str) else state for state in subprompts]
    if not all(isinstance(state, dict) and isinstance(state.get("text"), str) for state in states):
        raise _not_one(entry, where)
    unknown = {name for state in states for name in state} - {"text", "at", "duration", "negative"}
    if unknown:
        raise ValueError(f"{where}: a state has text, at, duration and negative, got {', '.join(sorted(unknown))}")
    negatives = tuple(str(state.get("negative", "")) for state in states)
    return Synopsis(
        str(entry.get("prompt", states[0]["text"])),
        tuple(state["text"] for state in states),
        str(entry.get("synopsis_source", GIVEN)),
        tuple(_position(value, where) for value in _column(states, "at", where)),
        tuple(_duration(value, where) for value in _column(states, "duration", where)),
        negatives if any(negatives) else (),
    )


def _not_one(entry: object, where: str) -> ValueError:
    return ValueError(f'{where}: a synopsis is {{"prompt": "...", "subprompts": ["...", ...]}}, got {json.dumps(entry)[:80]}')


def _column(states: list[dict[str, Any]], name: str, where: str) -> list[Any]:
    """Returns every state's value of a name; the last state may lack its duration."""
    values = [state[name] for state in states if name in state]
    whole = len(values) in (0, len(states))
    if not whole and not (name == "duration" and len(values) == len(states) - 1 and name not in states[-1]):
        raise ValueError(f"{where}: {name} stands at {len(values)} of {len(states)} states; give it to all or to none")
    return values


def _position(value: object, where: str) -> Position:
    if isinstance(value, str):
        return parse_position(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: a state's at is a frame such as 12, or a share such as 0.5 or '50%', got {value!r}")
    return value


def _duration(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: a state's duration is a number, got {value!r}")
    return float(value)
