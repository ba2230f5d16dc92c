"""Who may send requests: hosts, and pages of other origins."""

import asyncio

import httpx
import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from vstar_engine.serving.http.api_keys import ApiKeys
from vstar_engine.serving.http.middleware import AccessMiddleware
from vstar_engine.serving.settings import Settings
from vstar_engine.serving.telemetry.metrics import Metrics


async def answer_ok(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def test_http_1_0_may_leave_out_the_host():
    """As plain probes do; a page's name in DNS never comes without one."""

    def status(*headers):
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/livez", "headers": list(headers)}
        asyncio.run(AccessMiddleware(answer_ok, Settings(), ApiKeys({}), Metrics())(scope, None, send))
        return sent[0]["status"]

    assert status() == 200
    assert [status((b"host", host)) for host in (b"", b"evil.example")] == [403, 403]
    assert status((b"origin", b"http://evil.example")) == 403
