"""A request's line carries its id, route and status, and nothing its caller would not want kept."""

import asyncio
import io
import json
import logging

import httpx
import pytest
from fastapi import FastAPI

import support.serve_packages  # noqa: F401 - skips where they are missing
from vstar_engine.errors import MissingLibrary
from vstar_engine.serving.telemetry import request_log, tracing
from vstar_engine.serving.telemetry.metrics import Metrics

SECRET = "sk-do-not-log"


@pytest.fixture
def lines():
    """Returns a function that reads what was logged since."""
    stream = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    request_log.configure(stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:], root.level = before


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def app(metrics):
    made = FastAPI()
    made.add_middleware(request_log.RequestLogMiddleware, metrics=metrics)

    @made.get("/v1/videos/{id}")
    async def video(id: str):
        with request_log.about(id):
            logging.getLogger("inside").info("looked up")
        return {"id": id}

    @made.get("/broken")
    async def broken():
        raise RuntimeError("on purpose")

    @made.get("/livez")
    async def livez():
        return {}

    return made


def get(app, path, **headers):
    async def ask():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(ask())


def test_every_line_of_a_request_carries_its_id(app, lines):
    answer = get(app, "/v1/videos/video_1?prompt=secret", **{"x-request-id": "mine-1", "authorization": f"Bearer {SECRET}"})
    assert answer.headers["x-request-id"] == "mine-1"
    inside, outside = lines()
    assert (inside["message"], inside["request_id"], inside["job_id"]) == ("looked up", "mine-1", "video_1")
    assert (outside["route"], outside["status"], outside["request_id"]) == ("/v1/videos/{id}", 200, "mine-1")
    assert "secret" not in json.dumps(lines())
    assert SECRET not in json.dumps(lines())
    assert outside["time"].endswith("Z")
    assert outside["ms"] > 0


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'a"}\\n{"level":"error'])
def test_an_id_that_could_forge_a_line_is_replaced(app, given):
    id = get(app, "/v1/videos/1", **{"x-request-id": given}).headers["x-request-id"]
    assert id != given
    assert len(id) == 32


def test_unknown_paths_share_one_series_and_probes_stay_silent(app, lines, metrics):
    labels = {"method": "GET", "route": "other", "status": "404"}
    for path in ("/wp-admin", "/.env", "/livez"):
        get(app, path)
    assert metrics.registry.get_sample_value("vstar_http_seconds_count", labels) == 2
    assert [line["status"] for line in lines()] == [404, 404]


def test_a_crash_is_a_line_with_its_trace_and_a_500(app, lines):
    assert get(app, "/broken").status_code == 500
    assert [line["status"] for line in lines() if "status" in line] == [500]


def test_a_process_that_serves_no_requests_writes_the_same_lines(lines):
    from vstar_engine.serving.telemetry.json_log import as_json, formatter

    assert as_json()
    record = logging.makeLogRecord({"msg": "a %s", "args": ("worker",), "levelno": 20, "levelname": "INFO", "step": 3})
    line = json.loads(formatter(as_json()).format(record))
    assert (line["message"], line["level"], line["step"]) == ("a worker", "info", 3)
    assert "request_id" not in line


def test_spans_only_where_they_are_configured():
    assert not tracing.configure({})
    assert not tracing.configure({"OTEL_TRACES_EXPORTER": "none"})
    with pytest.raises(ValueError, match="otlp, console or none, got 'zipkin'"):
        tracing.configure({"OTEL_TRACES_EXPORTER": "zipkin"})
    assert tracing.trace_id() is None


def test_a_missing_exporter_is_said(modules):
    modules({"opentelemetry.sdk.trace": None})
    with pytest.raises(MissingLibrary, match="pip install opentelemetry-sdk"):
        tracing.configure({"OTEL_TRACES_EXPORTER": "console"})
