"""OpenTelemetry where it is configured: a span for each request, and one for each job with its stages inside.

The standard variables configure it (OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_TRACES_EXPORTER, OTEL_SERVICE_NAME ...). Without them
the API's own spans, which record nothing, are used.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import context, propagate, trace
from opentelemetry.trace import Span, SpanKind, StatusCode

from vstar_engine.errors import MissingLibrary
from vstar_engine.serving.jobs.events import Done, Event, Failed, Stage, Started
from vstar_engine.serving.jobs.job import Job

__all__ = ["Span", "answered", "configure", "event", "request", "trace_id"]

ASKED_FOR = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER")
NANOSECONDS = 1_000_000_000
tracer = trace.get_tracer("vstar_engine")

# the spans of running jobs, and of the stage each is in; emptied as jobs end
_jobs: dict[str, Span] = {}
_stages: dict[str, Span] = {}


def configure(environment: Mapping[str, str] = os.environ) -> bool:
    """Sends spans where the environment says, if it says so; MissingLibrary without the SDK or the exporter asked for."""
    exporter = environment.get("OTEL_TRACES_EXPORTER", "otlp")
    if exporter == "none" or not any(environment.get(name) for name in ASKED_FOR):
        return False
    if exporter not in ("otlp", "console"):
        raise ValueError(f"OTEL_TRACES_EXPORTER is otlp, console or none, got {exporter!r}")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
    except ImportError as error:
        raise MissingLibrary(
            "OpenTelemetry is configured but not installed; "
            "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http would do"
        ) from error
    os.environ.setdefault("OTEL_SERVICE_NAME", "vstar-engine")
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(ConsoleSpanExporter() if exporter == "console" else OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return True


@contextmanager
def request(scope: Mapping[str, object]) -> Iterator[Span]:
    """Makes the span of an HTTP request, inside the caller's where the caller sent one."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}  # type: ignore[attr-defined]
    method = str(scope["method"])
    with tracer.start_as_current_span(method, propagate.extract(headers), SpanKind.SERVER) as span:
        yield span


def answered(span: Span, method: str, route: str, status: int) -> None:
    """Names a request's span and says how it ended."""
    span.update_name(f"{method} {route}")
    span.set_attributes({"http.request.method": method, "http.route": route, "http.response.status_code": status})
    if status >= 500:
        span.set_status(StatusCode.ERROR)


def event(job: Job, event: Event) -> None:
    """Keeps a job's spans: one for the whole, from its acceptance on, and one for each stage."""
    match event:
        case Started():
            facts: dict[str, str | int] = {
                "vstar.job": job.id,
                "vstar.frames": job.frames,
                "vstar.steps": job.steps,
                "vstar.batch": event.batch,
            }
            _end(job.id)
            accepted = int(job.created_at * NANOSECONDS)
            _jobs[job.id] = tracer.start_span("job", context.Context(), attributes=facts, start_time=accepted)
            _jobs[job.id].add_event("started")
        case Stage() if job.id in _jobs:
            _end_stage(job.id)
            _stages[job.id] = tracer.start_span(event.name, trace.set_span_in_context(_jobs[job.id]))
        case Failed() if job.id in _jobs:
            _jobs[job.id].set_status(StatusCode.ERROR, event.code)
            _end(job.id)
        case Done():
            _end(job.id)


def _end_stage(id: str) -> None:
    if id in _stages:
        _stages.pop(id).end()


def _end(id: str) -> None:
    """Ends a job's spans: after its last event, or before a second try."""
    _end_stage(id)
    if id in _jobs:
        _jobs.pop(id).end()


def trace_id() -> str | None:
    """Returns the id of the trace being recorded, None where there is none."""
    found = trace.get_current_span().get_span_context()
    return f"{found.trace_id:032x}" if found.is_valid else None
