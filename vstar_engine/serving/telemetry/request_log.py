"""Request ids in every log line, and the middleware that assigns them.

A request's line holds its method, route and status, never its query, body or key. Prompts are logged at DEBUG only.
"""

import logging
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import json_log, tracing
from .metrics import Metrics

HEADER = b"x-request-id"
WELL_FORMED = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
UNKNOWN_ROUTE = "other"
# polled by machines every few seconds; logged at DEBUG
PROBES = ("/livez", "/readyz", "/health", "/metrics")
log = logging.getLogger("vstar_engine.http")

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
job_id: ContextVar[str | None] = ContextVar("job_id", default=None)


def configure(level: str = "info", as_json: bool = True, stream: TextIO | None = None) -> None:
    """Sends every log to `stream`, stderr if None, and mutes uvicorn's own access log."""
    context = {"request_id": request_id.get, "job_id": job_id.get, "trace_id": tracing.trace_id}
    json_log.configure(level.upper(), json_log.JsonLines(context) if as_json else json_log.formatter(False), stream)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
    # httpx logs the URL of every language model request at INFO
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def about(job: str) -> Iterator[None]:
    """Adds a job's id to every line that is logged inside the block."""
    token = job_id.set(job)
    try:
        yield
    finally:
        job_id.reset(token)


class RequestLogMiddleware:
    """ASGI middleware: adds an id, a span, a metric and a log line to every request. The response has the id in a header."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(HEADER, b"")
        id = given.decode() if WELL_FORMED.fullmatch(given) else uuid.uuid4().hex
        token = request_id.set(id)
        begun, answer = time.perf_counter(), {"status": 500, "seconds": 0.0}

        async def reply(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.update(status=message["status"], seconds=time.perf_counter() - begun)
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, id.encode())]}
            await send(message)

        try:
            with tracing.request(scope) as span:
                try:
                    await self.app(scope, receive, reply)
                finally:
                    self.report(scope, int(answer["status"]), answer["seconds"] or time.perf_counter() - begun, span)
        finally:
            request_id.reset(token)

    def report(self, scope: Scope, status: int, seconds: float, span: tracing.Span) -> None:
        route = getattr(scope.get("route"), "path", UNKNOWN_ROUTE)
        method = scope["method"] if scope["method"] in METHODS else UNKNOWN_ROUTE
        self.metrics.answered(method, route, status, seconds)
        tracing.answered(span, method, route, status)
        level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
        about_it = {"method": method, "route": route, "status": status, "ms": round(seconds * 1e3, 2)}
        log.log(level, "%s %s %d", method, route, status, extra=about_it)


METHODS = ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH")
