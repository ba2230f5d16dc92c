"""A client of `vstar-engine serve`: submit a video, wait for it, fetch it. Needs httpx alone.

from vstar_engine.client import Client

with Client("http://127.0.0.1:8000") as client:
    video = client.submit("a landscape from winter to spring", num_frames=64, seed=1)
    client.wait(video.id, lambda video: print(video.progress))
    client.fetch(video.id, "spring.mp4")
"""

import hashlib
import json
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from vstar_engine.artifacts.files import check_writable, write_aside
from vstar_engine.machine.outgoing_http import client_for, shown_address, usable_key

from .errors import JobFailed, ServerError

URL = "http://127.0.0.1:8000"
URL_VARIABLE, KEY_VARIABLE = "VSTAR_SERVER", "VSTAR_API_KEY"
# answers after which the same request may succeed
PASSING = (408, 429, 500, 502, 503, 504)
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0
LONGEST_POLL = 5.0
NO_SERVER = "is this a vstar-engine server?"
MOST_FETCHES = 3
VARIANTS = ("video", "thumbnail", "spritesheet")
QUEUED, RUNNING, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"


@dataclass(frozen=True)
class RemoteVideo:
    """A job as the server describes it: `progress` in percent, `content` the whole answer."""

    id: str
    status: str
    progress: int
    content: Mapping[str, Any] = field(repr=False)
    error: Mapping[str, Any] | None = None

    @staticmethod
    def of(content: Any) -> "RemoteVideo":
        """Reads an answer; ServerError where it is no job."""
        named = isinstance(content, Mapping) and all(isinstance(content.get(name), str) for name in ("id", "status"))
        progress = content.get("progress") or 0 if named else None
        if not isinstance(progress, int | float):
            raise ServerError(f"the answer holds no video's id and status: {NO_SERVER}")
        error = content.get("error")
        return RemoteVideo(
            content["id"], content["status"], int(progress), content, error if isinstance(error, Mapping) else None
        )

    @property
    def ended(self) -> bool:
        return self.status in (COMPLETED, FAILED)


class CutShort(ServerError):
    """An answer is not what the server says it holds; asking again may help."""


class Client:
    """A client of one server.

    `url` and `key` default to the environment variables VSTAR_SERVER and VSTAR_API_KEY. Requests that may succeed later are
    repeated for `patience` seconds; `timeout`, in seconds, is one request's. A submission carries an idempotency key, so that
    a repeated one makes no second job. Every method raises ServerError when the server cannot be reached or refuses. Raises
    ValueError for an address that does not begin with http:// or https://, or a key that no header can hold.
    """

    def __init__(self, url: str | None = None, key: str | None = None, patience: float = 60.0, timeout: float = 60.0):
        url = url or os.environ.get(URL_VARIABLE) or URL
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"a server's address starts with http:// or https://, got {shown_address(url)!r}")
        key = usable_key(key, "the API key") or usable_key(os.environ.get(KEY_VARIABLE), KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        address = url.rstrip("/").removesuffix("/v1")
        self.url, self.patience = shown_address(address), patience
        self._http = client_for(address, headers, timeout, ServerError, base_url=address)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def submit(self, prompt: str | None = None, *, idempotency_key: str | None = None, **settings: Any) -> RemoteVideo:
        """Submits a video and returns its job, which the server has stored.

        `settings` are the fields of the HTTP API, such as `num_frames`, `size` (WIDTHxHEIGHT in pixels), `seed` and `tar`; None
        leaves one out. Two submissions with one `idempotency_key` are one job.
        """
        body = {name: value for name, value in {"prompt": prompt, **settings}.items() if value is not None}
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return RemoteVideo.of(self._json("POST", "/v1/videos", json=body, headers=headers))

    def status(self, id: str) -> RemoteVideo:
        """Returns a job as it is now; ServerError 404 for an id that the server does not have."""
        return RemoteVideo.of(self._json("GET", _path(id)))

    def wait(self, id: str, progress: Callable[[RemoteVideo], None] | None = None, timeout: float | None = None) -> RemoteVideo:
        """Waits until a job has ended and returns the completed video.

        It outlasts restarts of the server of up to `patience` seconds. `progress` is called with the job at every change.
        Raises JobFailed when the job failed, TimeoutError after `timeout` seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        before: RemoteVideo | None = None
        while True:
            answer = self._send("GET", _path(id))
            video = RemoteVideo.of(self._content(answer, "GET", _path(id)))
            if progress and (before is None or video.content != before.content):
                progress(video)
            if video.status == FAILED:
                error = video.error or {}
                raise JobFailed(f"{id} failed: {error.get('message', 'the server says no more')}", str(error.get("code")))
            if video.ended:
                return video
            before, pause = video, _poll_after(answer)
            if end is not None and time.monotonic() + pause > end:
                raise TimeoutError(f"{id} is {video.status}, {video.progress} %, after {timeout:g} seconds")
            time.sleep(pause)

    def events(self, id: str) -> Iterator[dict[str, Any]]:
        """Yields a job's events as {"event": kind, ...}: stages, steps with the time left, previews, its end."""
        with self._open("GET", f"{_path(id)}/events", headers={"Accept": "text/event-stream"}) as answer:
            kind, data = "message", []
            for line in answer.iter_lines():
                name, _, value = line.partition(":")
                if name == "event":
                    kind = value.strip()
                elif name == "data":
                    data.append(value.removeprefix(" "))
                elif not line and data:
                    yield {"event": kind, **json.loads("\n".join(data))}
                    kind, data = "message", []

    def fetch(self, id: str, path: str | Path, variant: str = "video", force: bool = False) -> Path:
        """Downloads a completed video, its thumbnail or its spritesheet, and returns the path.

        The file is complete, by the size and sha256 that the server states, or absent. Raises ValueError for another variant,
        OutputError where the file cannot be written or exists and `force` is off, ServerError for a download that is cut short.
        """
        if variant not in VARIANTS:
            raise ValueError(f"a variant is one of {', '.join(VARIANTS)}, got {variant!r}")
        path = Path(path)
        check_writable(path, force)
        end, tries = time.monotonic() + self.patience, 1
        while True:
            try:
                with write_aside(path) as aside:
                    self._download(id, variant, aside)
                return path
            except CutShort:
                if tries == MOST_FETCHES or not self._pause(end, tries, None):
                    raise
                tries += 1

    def _download(self, id: str, variant: str, path: Path) -> None:
        """Writes an answer's content; CutShort unless it is what the server says it holds."""
        hashed, size = hashlib.sha256(), 0
        with self._open("GET", f"{_path(id)}/content", params={"variant": variant}) as answer, path.open("wb") as file:
            for part in answer.iter_bytes():
                file.write(part)
                hashed.update(part)
                size += len(part)
        tag = answer.headers.get("etag", "").removeprefix("W/").strip('"')
        wanted: Mapping[str, Any] = {"sha256": tag} if re.fullmatch("[0-9a-f]{64}", tag) else {}
        if not wanted and variant == VARIANTS[0] and "content-length" not in answer.headers:
            wanted = self.status(id).content
        found = {"sha256": hashed.hexdigest(), "bytes": size}
        if any(wanted.get(name) not in (None, found[name]) for name in found):
            raise CutShort(f"{self.url} sent {size} bytes of {id} that are not its {variant}: the answer was cut short")

    def cancel(self, id: str) -> RemoteVideo:
        """Cancels a job and returns it: failed, with the code `cancelled`. It stays listed."""
        return RemoteVideo.of(self._json("POST", f"{_path(id)}/cancel"))

    def delete(self, id: str) -> None:
        """Cancels a job if it runs, and deletes it with its files."""
        self._json("DELETE", _path(id))

    def list(self, limit: int | None = None, order: str = "desc") -> Iterator[RemoteVideo]:
        """Yields jobs, the newest first or, with order "asc", the oldest; at most `limit`."""
        after: str | None = None
        left = limit
        while left is None or left > 0:
            wanted = {"order": order, "limit": min(left or 100, 100), **({"after": after} if after else {})}
            page = self._json("GET", "/v1/videos", params=wanted)
            if not isinstance(page.get("data"), list):
                raise ServerError(f"{self.url} lists no videos: {NO_SERVER}")
            yield from map(RemoteVideo.of, page["data"])
            if not page.get("has_more"):
                return
            after, left = page["last_id"], None if left is None else left - len(page["data"])

    def generate(
        self, prompt: str | None, path: str | Path, progress: Callable[[RemoteVideo], None] | None = None, **settings: Any
    ) -> Path:
        """Submits a video, waits for it and downloads it; returns the path. Arguments and errors are those of the three."""
        check_writable(Path(path))
        return self.fetch(self.wait(self.submit(prompt, **settings).id, progress).id, path)

    def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        return self._content(self._send(method, path, **request), method, path)

    def _content(self, answer: httpx.Response, method: str, path: str) -> dict[str, Any]:
        try:
            content = answer.json()
        except ValueError as error:
            raise ServerError(f"{self.url} answered {method} {path} without JSON: {NO_SERVER}") from error
        if not isinstance(content, dict):
            raise ServerError(f"{self.url} answered {method} {path} without an object: {NO_SERVER}")
        return content

    def _send(self, method: str, path: str, stream: bool = False, **request: Any) -> httpx.Response:
        """Returns a response of status 2xx, read unless `stream`; retries what may succeed later, else raises ServerError."""
        end, tries = time.monotonic() + self.patience, 0
        while True:
            asked = self._http.build_request(method, path, **request)
            try:
                answer = self._http.send(asked, stream=stream)
                if answer.is_success:
                    return answer
                answer.read()
                answer.close()
                failure = refusal(answer)
            except httpx.TransportError as error:
                answer = None
                failure = ServerError(f"no answer from {self.url} ({_said(error)}); is `vstar-engine serve` running?")
            if not self._pause(end, tries, answer):
                raise failure
            tries += 1

    @contextmanager
    def _open(self, method: str, path: str, **request: Any) -> Iterator[httpx.Response]:
        """Opens a response whose content is read inside the block."""
        answer = self._send(method, path, stream=True, **request)
        try:
            yield answer
        except httpx.TransportError as error:
            raise ServerError(f"{self.url} broke off in the middle of an answer ({_said(error)})") from error
        finally:
            answer.close()

    def _pause(self, end: float, tries: int, answer: httpx.Response | None) -> bool:
        """Returns whether to try again, after waiting for it."""
        if answer is not None and (answer.status_code not in PASSING or answer.headers.get("x-should-retry") == "false"):
            return False
        pause = min(FIRST_PAUSE * 2**tries, LONGEST_PAUSE) * random.uniform(0.75, 1.0)
        if answer is not None and (asked := answer.headers.get("retry-after", "")).isdecimal():
            pause = float(asked)
        if time.monotonic() + pause > end:
            return False
        time.sleep(pause)
        return True


def refusal(answer: httpx.Response) -> ServerError:
    """Returns the error that a response describes."""
    try:
        error = answer.json()["error"]
        return ServerError(error["message"], answer.status_code, error.get("code"), error.get("param"))
    except (ValueError, KeyError, TypeError):
        return ServerError(f"the server answered HTTP {answer.status_code}: {answer.text[:200]}", answer.status_code)


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _path(id: str) -> str:
    if not id.replace("_", "").isalnum():
        raise ValueError(f"a video's id is letters, digits and underscores, got {id!r}")
    return f"/v1/videos/{id}"


def _poll_after(answer: httpx.Response) -> float:
    """Returns how long the server asks a client to wait, in seconds."""
    said = answer.headers.get("openai-poll-after-ms", "")
    return min(int(said) / 1000, LONGEST_POLL) if said.isdecimal() else 1.0
