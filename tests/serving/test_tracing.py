"""The spans of requests and jobs, read from OpenTelemetry's own memory exporter."""

import time

import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs opentelemetry-sdk")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from vstar_engine.serving.jobs.events import Done, Failed, Stage, Started
from vstar_engine.serving.jobs.job import Job, new_id
from vstar_engine.serving.telemetry import tracing

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider.get_tracer("test")


@pytest.fixture
def spans(exporter):
    return exporter.get_finished_spans


@pytest.fixture
def job():
    return Job(
        id=new_id(),
        key_id="key",
        model="mini",
        prompt="a secret lake",
        states=("a secret lake",),
        frames=16,
        size=(96, 128),
        created_at=time.time() - 3.0,
    )


def test_a_job_is_a_span_from_its_acceptance_with_its_stages_inside(spans, tracer, job):
    jobs = tracing.JobTracer(tracer)
    for event in (Started(2), Stage("text"), Stage("denoise"), Done("a.mp4", 1, "0", 16, 128, 96)):
        jobs.event(job, event)
    text, denoise, whole = spans()
    assert (text.name, denoise.name, whole.name) == ("text", "denoise", "job")
    assert text.parent.span_id == denoise.parent.span_id == whole.context.span_id
    assert (whole.end_time - whole.start_time) / 1e9 == pytest.approx(3.0, abs=0.5)
    assert whole.attributes["vstar.batch"] == 2
    assert "secret" not in str(dict(whole.attributes))
    assert len(jobs) == 0


def test_a_second_try_and_a_failure_leave_no_span_open(spans, tracer, job):
    jobs = tracing.JobTracer(tracer)
    for event in (Started(2), Stage("denoise"), Started(1), Stage("denoise"), Failed("out_of_memory", "too large")):
        jobs.event(job, event)
    first, second = [span for span in spans() if span.name == "job"]
    assert first.status.is_unset
    assert second.status.description == "out_of_memory"
    assert len(jobs) == 0


def test_events_of_a_job_without_a_span_are_passed_over(spans, tracer, job):
    jobs = tracing.JobTracer(tracer)
    for event in (Stage("text"), Failed("cancelled", "before it started")):
        jobs.event(job, event)
    assert not spans()


def test_a_request_joins_its_callers_trace(spans, tracer):
    scope = {"method": "GET", "headers": [(b"traceparent", PARENT.encode())]}
    with tracing.request(scope, tracer) as span:
        assert tracing.trace_id() == PARENT.split("-")[1]
        tracing.answered(span, "GET", "/v1/videos/{id}", 503)
    (made,) = spans()
    assert made.name == "GET /v1/videos/{id}"
    assert made.attributes["http.response.status_code"] == 503
    assert not made.status.is_ok
