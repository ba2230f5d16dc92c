"""Who may send requests: hosts, and pages of other origins."""

import argparse
import asyncio

import httpx
import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from vstar_engine.commands import serve
from vstar_engine.serving.http.api_keys import ApiKeys, hashed
from vstar_engine.serving.http.middleware import AccessMiddleware, guarded
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


PAGE = "https://vstar.example.com"
ASKED = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


def sent_by(origin, method="GET", keys=None, **headers):
    """Returns the answer to a request of a page, by a server that lets in the pages of PAGE."""

    async def request():
        app = guarded(answer_ok, Settings(allow_origins=(PAGE,)), ApiKeys(keys or {}), Metrics())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, "/v1/videos", headers={"origin": origin, **headers})

    return asyncio.run(request())


@pytest.mark.parametrize("keys", [{}, {hashed("a-key-of-16-letters"): "alice"}], ids=["no keys", "keys"])
def test_pages_of_allowed_origins_get_in(keys):
    asked = sent_by(PAGE, "OPTIONS", keys, **ASKED)
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, PAGE)
    assert asked.headers["access-control-allow-headers"].lower() == "authorization,content-type"
    answer = sent_by(PAGE, "POST", keys, authorization="Bearer a-key-of-16-letters")
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)


def test_a_page_can_read_why_it_was_refused():
    answer = sent_by(PAGE, keys={hashed("a-key-of-16-letters"): "alice"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, PAGE)


def test_pages_of_other_origins_stay_out():
    answer = sent_by("https://evil.example")
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    assert "start it with --allow-origin ORIGIN, or --keys FILE" in answer.json()["error"]["message"]
    assert sent_by("https://evil.example", "OPTIONS", **ASKED).status_code == 400


@pytest.mark.parametrize("origin", ["*", "example.com", "https://example.com/page", "https://a@example.com", ""])
def test_what_is_no_origin(origin):
    with pytest.raises(ValueError, match=r"an origin is SCHEME://HOST\[:PORT\], such as https://example.com, got "):
        Settings(allow_origins=(origin,))


def test_an_origin_as_it_is_copied_from_a_browser():
    parser = argparse.ArgumentParser()
    serve.add_options(parser)
    given = parser.parse_args(["--allow-origin", "https://VSTAR.example.com/", "--allow-origin", "http://localhost:5173"])
    assert serve.settings_from(given).allow_origins == (PAGE, "http://localhost:5173")
