"""Prompts to synopses: the states a video passes through, given on the spot or read from a file."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Synopsis:
    """A prompt and the states it becomes, in order; at least one state."""

    prompt: str
    states: tuple[str, ...]


def read_synopses(path: str | Path) -> list[Synopsis]:
    """Reads a file of synopses.

    JSON: one {"prompt": ..., "subprompts": [...]} object or a list of them, each a video. Plain text: one state a line, all of
    them one video. Raises ValueError when the file is absent, empty or neither.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the synopsis {path}: {error}") from error
    if not text.lstrip().startswith(("{", "[")):
        lines = tuple(line.strip() for line in text.splitlines() if line.strip())
        if not lines:
            raise ValueError(f"{path} holds no states; give one a line")
        return [Synopsis(lines[0], lines)]
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} looks like JSON but is not ({error})") from error
    entries = content if isinstance(content, list) else [content]
    if not entries:
        raise ValueError(f"{path} holds an empty list of synopses")
    return [_synopsis(entry, path) for entry in entries]


def _synopsis(entry: object, path: Path) -> Synopsis:
    states = entry.get("subprompts") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(states, list) or not all(isinstance(state, str) for state in states):
        raise ValueError(f'{path}: a synopsis is {{"prompt": "...", "subprompts": ["...", ...]}}, got {json.dumps(entry)[:80]}')
    if not states:
        raise ValueError(f"{path}: the synopsis of {str(entry.get('prompt', ''))[:80]!r} has no subprompts")
    return Synopsis(str(entry.get("prompt", states[0])), tuple(states))
