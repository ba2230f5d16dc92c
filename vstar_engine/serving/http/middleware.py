"""The middleware of every route: API keys, origin and body size of requests, and security headers of responses."""

import json
import re
from collections.abc import Mapping
from urllib.parse import SplitResult, urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vstar_engine.serving.errors import FINAL, UNAUTHENTICATED, ApiError
from vstar_engine.serving.settings import LOOPBACK_NAMES, Settings
from vstar_engine.serving.telemetry.metrics import Metrics

from .api_keys import LOCAL, METRICS, ApiKeys
from .other_clients import our_path
from .service import Caller

# paths open without a key: they reveal nothing, and probes and browsers have none yet
OPEN = ("/", "/livez", "/readyz", "/health")
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"x-frame-options", b"DENY")]
LONGEST_KEY = 200
METHODS = ("GET", "POST", "DELETE")
# headers of answers that a page of another origin may read
EXPOSED = ("x-request-id", "x-should-retry", "retry-after", "openai-poll-after-ms", "content-range", "etag")
WAY_IN = "start it with --keys FILE, or put a proxy before it that keeps Host and Origin"
# requests for a video
SUBMISSION = re.compile(r"/v1/videos(/sync|/[^/]+/remix)?")


def guarded(app: ASGIApp, settings: Settings, keys: ApiKeys, metrics: Metrics) -> ASGIApp:
    """Returns an application that checks access, and lets in pages of the origins in `settings.allow_origins`."""
    access = AccessMiddleware(app, settings, keys, metrics)
    if not settings.allow_origins:
        return access
    # outside the check of keys, which a preflight never carries
    return CORSMiddleware(access, settings.allow_origins, allow_methods=METHODS, allow_headers=("*",), expose_headers=EXPOSED)


class AccessMiddleware:
    """ASGI middleware: checks key, origin and body size, and puts the `Caller` into the scope's state."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: ApiKeys, metrics: Metrics):
        self.app, self.settings, self.keys, self.metrics = app, settings, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        # no redirect, which behind a proxy would name this server's scheme and host
        scope["path"] = our_path(scope["path"])

        async def reply(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            scope.setdefault("state", {})["caller"] = self._caller(scope["path"], headers)
            self._check_length(headers)
        except ApiError as error:
            count_refusal(self.metrics, scope, error)
            await answer(error, reply)
            return
        await self.app(scope, self._limited(receive), reply)

    def _caller(self, path: str, headers: Mapping[str, str]) -> Caller:
        owner = LOCAL
        if not self.keys:
            self._check_source(headers)
        elif path not in OPEN:
            found = self.keys.owner(headers.get("authorization"))
            if found is None:
                said = "an API key is required: Authorization: Bearer KEY"
                raise ApiError(401, "invalid_api_key", said, None, UNAUTHENTICATED, {"WWW-Authenticate": "Bearer"})
            if found == METRICS and path != "/metrics":
                raise ApiError(403, "forbidden_path", "this key is valid for /metrics only", headers=FINAL)
            owner = found
        again = headers.get("x-stainless-retry-count", "0")
        key = headers.get("idempotency-key")
        if key is not None and not (0 < len(key) <= LONGEST_KEY and key.isprintable()):
            raise ApiError(400, "invalid_value", f"an Idempotency-Key has 1 to {LONGEST_KEY} printable characters")
        return Caller(owner, key, int(again) if again.isascii() and again.isdigit() and len(again) < 5 else 0)

    def _check_source(self, headers: Mapping[str, str]) -> None:
        """Refuses other sites' pages on a server without keys: by origin, and by host against DNS rebinding."""
        host = headers.get("host")  # HTTP/1.0 may leave it out, which no browser does
        if (
            host is not None
            and self.settings.loopback
            and _parts(f"//{host}").hostname not in (*LOOPBACK_NAMES, self.settings.host)
        ):
            raise ApiError(
                403,
                "forbidden_host",
                f"a server without keys answers only to its loopback names, not {host[:80]!r}: {WAY_IN}",
                headers=FINAL,
            )
        origin = headers.get("origin")
        if origin is not None and origin not in self.settings.allow_origins and _parts(origin).netloc != host:
            raise ApiError(
                403,
                "forbidden_origin",
                f"pages of other sites ({origin[:80]!r}) may not use a server without keys: "
                f"start it with --allow-origin ORIGIN, or {WAY_IN.removeprefix('start it with ')}",
                headers=FINAL,
            )

    def _check_length(self, headers: Mapping[str, str]) -> None:
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > self.settings.max_body):
            raise self._too_long()

    def _limited(self, receive: Receive) -> Receive:
        got = 0

        async def limited() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self.settings.max_body:
                raise self._too_long()
            return message

        return limited

    def _too_long(self) -> ApiError:
        return ApiError(413, "body_too_large", f"a body may have at most {self.settings.max_body} bytes")


def _parts(url: str) -> SplitResult:
    """Splits a URL; an invalid one has no parts."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def count_refusal(metrics: Metrics, scope: Scope, error: ApiError) -> None:
    """Counts an error that refused a video; not one of another request, or after the video was accepted."""
    asked = scope["method"] == "POST" and SUBMISSION.fullmatch(scope["path"]) is not None
    if asked and not scope.get("state", {}).get("accepted", False):
        metrics.refused(error.code)


async def answer(error: ApiError, send: Send) -> None:
    """Sends an error response."""
    body = json.dumps(error.body()).encode()
    headers = {**error.headers, "content-type": "application/json", "content-length": str(len(body))}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
