"""Turns a prompt into states with a language model at an OpenAI-compatible endpoint; validates and caches them."""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from vstar_engine.artifacts.files import write_aside
from vstar_engine.errors import EndpointError, MissingLibrary
from vstar_engine.machine.outgoing_http import client_for, shown_address, usable_key

from .llm_answer import parse_states

log = logging.getLogger(__name__)

FEWEST, MOST = 2, 16
LONGEST_STATE = 300  # characters; 75 tokens are read
LONGEST_ANSWER = 2**20  # bytes

INSTRUCTION = (
    "You get the prompt of a video that changes. Describe the states it passes through, in order of time, {how_many}. "
    "Write one short sentence for each state, as the description of a single picture: say plainly what is seen, do not tell "
    "a story. Keep the same subject and place in every state, so that neighbouring states follow from each other. "
    'For example, "a boy is getting old" has the states "a young boy" and "an old man".'
)
STATES_SCHEMA = {
    "type": "object",
    "properties": {"states": {"type": "array", "items": {"type": "string"}}},
    "required": ["states"],
    "additionalProperties": False,
}
AS_JSON = 'Answer with JSON only: {"states": ["...", "..."]}.'
# how an answer is asked for, strictest first: fields of the request, and words for the model
MODES: tuple[tuple[dict[str, Any], str], ...] = (
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "synopsis", "strict": True, "schema": STATES_SCHEMA},
            }
        },
        AS_JSON,
    ),
    ({"response_format": {"type": "json_object"}}, AS_JSON),
    ({}, "Answer with a numbered list, one state a line, and nothing else."),
)
UNAUTHORISED = (401, 403)
# answers that are about the form of a request; others are about the endpoint or the key
FORM_REFUSED = (400, 404, 405, 415, 422, 501)
BUSY = (429, 500, 502, 503, 504)
MOST_WAITS, FIRST_WAIT = 3, 1.0


@dataclass(frozen=True)
class Endpoint:
    """The address and name of a chat model; `timeout` of a request is in seconds."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", usable_key(self.key, "the endpoint's key"))
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"the endpoint's address starts with http:// or https://, got {shown_address(self.url)!r}")
        if not self.model:
            raise ValueError("an endpoint needs the name of a model; give --llm-model")
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"the endpoint's timeout is a number of seconds above 0, got {self.timeout}")

    @property
    def chat_url(self) -> str:
        base = self.url.rstrip("/")
        return base if base.endswith("/chat/completions") else base + "/chat/completions"


class Unsupported(EndpointError):
    """The endpoint does not support this form of request; another may work."""


class Busy(EndpointError):
    """The endpoint cannot answer now; `wait` is the seconds it asks for, None where it names none."""

    def __init__(self, message: str, wait: float | None):
        super().__init__(message)
        self.wait = wait


class Llm:
    """A chat model that turns prompts into states; remembers which response format the endpoint supports."""

    def __init__(self, endpoint: Endpoint, cache: Path | None = None):
        self.endpoint, self.cache = endpoint, cache
        self._mode = 0
        try:
            httpx = import_module("httpx")
        except ImportError as error:
            raise MissingLibrary(f"asking a language model needs the httpx package ({error}); install it") from error
        headers = {"Content-Type": "application/json"}
        if endpoint.key:
            headers["Authorization"] = f"Bearer {endpoint.key}"
        self._failures: tuple[type[Exception], ...] = (httpx.HTTPError, httpx.InvalidURL)
        self._client = client_for(endpoint.chat_url, headers, endpoint.timeout, EndpointError)

    def states(self, prompt: str, count: int | None = None, most: int = MOST) -> tuple[str, ...]:
        """Returns the states of a prompt, `count` of them or 2 to `most`; answers are cached.

        Raises EndpointError when the endpoint cannot be reached, refuses, or answers twice with something unusable.
        """
        how_many = f"exactly {count} of them" if count else f"at least {FEWEST} and at most {most} of them"
        instruction = INSTRUCTION.format(how_many=how_many)
        kept = self._kept(prompt, instruction)
        if kept is not None and (found := _read(kept)) is not None and not complaint(found, count, most):
            return found
        states = self._ask(prompt, instruction, count, most)
        if kept is not None:
            content = {"prompt": prompt, "model": self.endpoint.model, "instruction": instruction, "states": states}
            try:
                kept.parent.mkdir(parents=True, exist_ok=True)
                with write_aside(kept) as aside:
                    aside.write_text(json.dumps(content))
            except OSError as error:
                log.warning("the synopsis is not kept: %s", error)
        return states

    def _kept(self, prompt: str, instruction: str) -> Path | None:
        key = json.dumps([prompt, self.endpoint.model, instruction]).encode()
        return None if self.cache is None else self.cache / f"{hashlib.sha256(key).hexdigest()}.json"

    def _ask(self, prompt: str, instruction: str, count: int | None, most: int) -> tuple[str, ...]:
        # a local variable: a server asks on several threads at once
        mode, last_chances = self._mode, 1
        while True:
            fields, form = MODES[mode]
            messages = [{"role": "system", "content": f"{instruction} {form}"}, {"role": "user", "content": prompt}]
            try:
                states = self._converse(fields, messages, count, most)
            except Unsupported as error:
                if mode < len(MODES) - 1:
                    log.info("%s; asking in another form", error)
                    mode += 1
                elif last_chances and self._mode == mode:  # another thread has just been answered in this form
                    last_chances -= 1
                else:
                    raise
            else:
                self._mode = mode
                return states

    def _converse(
        self, fields: dict[str, Any], messages: list[dict[str, str]], count: int | None, most: int
    ) -> tuple[str, ...]:
        """Asks for states, and once more with the complaint when the answer cannot be used."""
        wrong = ""
        for _ in range(2):
            answer, whole = self._patiently({"model": self.endpoint.model, "messages": messages, **fields})
            states = parse_states(answer)
            wrong = complaint(states, count, most) if whole else "it is cut short"
            if not wrong:
                return states
            log.info("the model's answer cannot be used: %s", wrong)
            again = f"That cannot be used: {wrong}. Answer again, in the form asked for."
            messages = [*messages, {"role": "assistant", "content": answer[:2000]}, {"role": "user", "content": again}]
        raise EndpointError(f"{self.endpoint.model} gave no usable synopsis: {wrong}")

    def _patiently(self, body: dict[str, Any]) -> tuple[str, bool]:
        """Sends a request, and again while the endpoint is busy, within the endpoint's timeout."""
        end = time.monotonic() + self.endpoint.timeout
        for waits in range(MOST_WAITS + 1):
            try:
                return self._post(body)
            except Busy as busy:
                pause = FIRST_WAIT * 2**waits if busy.wait is None else busy.wait
                if waits == MOST_WAITS or time.monotonic() + pause > end:
                    raise
                log.info("%s; asking again in %g s", busy, pause)
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _post(self, body: dict[str, Any]) -> tuple[str, bool]:
        """Sends one request; returns the answer's text and whether it is complete."""
        url, started = shown_address(self.endpoint.chat_url), time.monotonic()
        try:
            with self._client.stream("POST", self.endpoint.chat_url, content=json.dumps(body)) as response:
                content = bytearray()
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) > LONGEST_ANSWER:
                        raise EndpointError(f"{url} answered with more than {LONGEST_ANSWER} bytes")
                    # the client's own timeout starts anew with every byte
                    if time.monotonic() - started > self.endpoint.timeout:
                        raise EndpointError(f"{url} did not finish its answer within {self.endpoint.timeout:g} s")
        except self._failures as error:
            raise EndpointError(f"cannot ask {url}: {str(error) or type(error).__name__}") from error
        if response.status_code in UNAUTHORISED:
            raise EndpointError(f"{url} refuses the key (HTTP {response.status_code}); name its variable with --llm-key-env")
        if not response.is_success:
            # it may repeat the prompt
            log.debug("%s said: %s", url, " ".join(content[:200].decode(errors="replace").split()))
            said = f"{url} answered HTTP {response.status_code}"
            if response.status_code in BUSY:
                raise Busy(said, _asked_wait(response.headers.get("retry-after", "")))
            raise Unsupported(said) if response.status_code in FORM_REFUSED else EndpointError(said)
        return _content(bytes(content), url)


def _asked_wait(text: str) -> float | None:
    """Reads a Retry-After: seconds, or a date; None for neither."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None


def _content(body: bytes, url: str) -> tuple[str, bool]:
    try:
        choice = json.loads(body)["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise Unsupported(f"{url} did not answer as a chat endpoint does") from error
    return text if isinstance(text, str) else "", choice.get("finish_reason") != "length"


def _read(kept: Path) -> tuple[str, ...] | None:
    try:
        states = json.loads(kept.read_text())["states"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # never asked, or a damaged file: ask again
    return tuple(states) if isinstance(states, list) and all(isinstance(state, str) for state in states) else None


def complaint(states: Sequence[str], count: int | None, most: int) -> str:
    """Returns why states cannot be used (their number, a length, the same state twice in a row), or ""."""
    if count and len(states) != count:
        return f"{count} states were asked for, it has {len(states)}"
    if not count and not FEWEST <= len(states) <= most:
        return f"{FEWEST} to {most} states were asked for, it has {len(states)}"
    for i, state in enumerate(states, 1):
        if not 0 < len(state) <= LONGEST_STATE:
            return f"a state has 1 to {LONGEST_STATE} characters, number {i} has {len(state)}"
        if i > 1 and state.lower() == states[i - 2].lower():
            return f"states {i - 1} and {i} are the same"
    return ""
