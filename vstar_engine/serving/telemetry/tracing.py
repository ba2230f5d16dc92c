"""OpenTelemetry tracing: a span for each request, and one for each job with its stages inside.

It is configured by the standard variables (OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_TRACES_EXPORTER, OTEL_SERVICE_NAME ...).
Without them spans are not recorded.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import context, propagate, trace
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer

from vstar_engine.errors import MissingLibrary
from vstar_engine.serving.jobs.events import Done, Event, Failed, Stage, Started
from vstar_engine.serving.jobs.job import Job

__all__ = ["JobTracer", "Span", "answered", "configure", "request", "trace_id"]

ASKED_FOR = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER")
NANOSECONDS = 1_000_000_000
tracer = trace.get_tracer("vstar_engine")


def configure(environment: Mapping[str, str] = os.environ) -> bool:
    """Exports spans as the environment asks; returns whether it does. MissingLibrary without the SDK or the exporter."""
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
            "install it: pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
        ) from error
    os.environ.setdefault("OTEL_SERVICE_NAME", "vstar-engine")
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(ConsoleSpanExporter() if exporter == "console" else OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return True


@contextmanager
def request(scope: Mapping[str, object], tracer: Tracer = tracer) -> Iterator[Span]:
    """Opens the span of an HTTP request, as a child of the caller's span if the request names one."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}  # type: ignore[attr-defined]
    method = str(scope["method"])
    with tracer.start_as_current_span(method, propagate.extract(headers), SpanKind.SERVER) as span:
        yield span


def answered(span: Span, method: str, route: str, status: int) -> None:
    """Sets the name and the result of a request's span."""
    span.update_name(f"{method} {route}")
    span.set_attributes({"http.request.method": method, "http.route": route, "http.response.status_code": status})
    if status >= 500:
        span.set_status(StatusCode.ERROR)


class JobTracer:
    """The spans of running jobs: one for each job from its acceptance on, and one for each stage."""

    def __init__(self, tracer: Tracer = tracer):
        self._tracer = tracer
        self._jobs: dict[str, Span] = {}
        self._stages: dict[str, Span] = {}

    def __len__(self) -> int:
        return len(self._jobs) + len(self._stages)

    def event(self, job: Job, event: Event) -> None:
        """Starts and ends spans by an event of a job."""
        match event:
            case Started():
                facts: dict[str, str | int] = {
                    "vstar.job": job.id,
                    "vstar.frames": job.frames,
                    "vstar.steps": job.steps,
                    "vstar.batch": event.batch,
                }
                self._end(job.id)
                accepted = int(job.created_at * NANOSECONDS)
                span = self._tracer.start_span("job", context.Context(), attributes=facts, start_time=accepted)
                self._jobs[job.id] = span
                span.add_event("started")
            case Stage() if job.id in self._jobs:
                self._end_stage(job.id)
                inside = trace.set_span_in_context(self._jobs[job.id])
                self._stages[job.id] = self._tracer.start_span(event.name, inside)
            case Failed() if job.id in self._jobs:
                self._jobs[job.id].set_status(StatusCode.ERROR, event.code)
                self._end(job.id)
            case Done():
                self._end(job.id)

    def _end_stage(self, id: str) -> None:
        if id in self._stages:
            self._stages.pop(id).end()

    def _end(self, id: str) -> None:
        """Ends a job's spans: after its last event, or before a retry."""
        self._end_stage(id)
        if id in self._jobs:
            self._jobs.pop(id).end()


def trace_id() -> str | None:
    """Returns the id of the current trace, None if there is none."""
    found = trace.get_current_span().get_span_context()
    return f"{found.trace_id:032x}" if found.is_valid else None
