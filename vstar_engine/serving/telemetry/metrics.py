"""What Prometheus reads at `/metrics`: jobs, stages, steps and batches as they happen, and gauges read when asked."""

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from vstar_engine.serving.jobs.events import Done, Event, Failed, Started, Step
from vstar_engine.serving.jobs.job import Job

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
COMPLETED = "completed"

# a mini clip takes a second, a long one on one GPU an hour
LONG = (0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 240, 480, 900, 1800, 3600)
SHORT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 60)
HTTP = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)
FACTORS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCHES = (1, 2, 4, 8, 16, 32)

# what `watch` may be told to read: a gauge or a counter, and what it says
GAUGE, COUNTER = GaugeMetricFamily, CounterMetricFamily
WATCHED: dict[str, tuple[type[GaugeMetricFamily] | type[CounterMetricFamily], str]] = {
    "vstar_queued_jobs": (GAUGE, "Jobs accepted and not started"),
    "vstar_running_jobs": (GAUGE, "Jobs an engine works on"),
    "vstar_queue_limit": (GAUGE, "Jobs the queue takes before it answers 429"),
    "vstar_ready": (GAUGE, "1 while the engine takes jobs"),
    "vstar_draining": (GAUGE, "1 while the server finishes its jobs and takes no others"),
    "vstar_disk_free_bytes": (GAUGE, "Bytes left where videos are kept"),
    "vstar_stored_bytes": (GAUGE, "Bytes of kept videos"),
    "vstar_event_streams": (GAUGE, "Clients that listen to a job's events"),
    "vstar_embedding_cache_bytes": (GAUGE, "Bytes of kept text embeddings"),
    "vstar_embedding_cache_hits": (COUNTER, "Synopses whose embeddings were kept"),
    "vstar_embedding_cache_misses": (COUNTER, "Synopses that had to be encoded"),
    "vstar_worker_restarts": (COUNTER, "Engines started again after a crash or a hang"),
}


class Watched(Collector):
    """Reads every registered source when Prometheus asks."""

    def __init__(self) -> None:
        self.sources: dict[str, Callable[[], float]] = {}

    def collect(self) -> Iterable[Metric]:
        for name, read in self.sources.items():
            family, help = WATCHED[name]
            yield family(name, help, value=read())


REGISTRY = CollectorRegistry()
WATCHING = Watched()
REGISTRY.register(WATCHING)
ProcessCollector(registry=REGISTRY)

ACCEPTED = Counter("vstar_jobs_accepted", "Jobs taken into the store", registry=REGISTRY)
REFUSED = Counter("vstar_jobs_refused", "Requests for a video that were not taken, by error code", ["code"], registry=REGISTRY)
FINISHED = Counter(
    "vstar_jobs_finished", "Jobs that ended: completed, or the code they failed with", ["status"], registry=REGISTRY
)
RECOVERED = Counter("vstar_jobs_recovered", "Jobs taken up again after a restart", registry=REGISTRY)
FRAMES = Counter("vstar_frames", "Frames of completed videos", registry=REGISTRY)
JOB_SECONDS = Histogram("vstar_job_seconds", "From acceptance to the end of a job", ["status"], buckets=LONG, registry=REGISTRY)
QUEUE_SECONDS = Histogram("vstar_queue_seconds", "From acceptance to the engine", buckets=LONG, registry=REGISTRY)
STAGE_SECONDS = Histogram("vstar_stage_seconds", "Of a stage of a video", ["stage"], buckets=LONG, registry=REGISTRY)
STEP_SECONDS = Histogram("vstar_step_seconds", "Between two denoising steps of a job", buckets=SHORT, registry=REGISTRY)
BATCH_SIZE = Histogram("vstar_batch_size", "Size of a job.s batch, observed once per job", buckets=BATCHES, registry=REGISTRY)
REAL_TIME = Histogram("vstar_real_time_factor", "Seconds of work for a second of video", buckets=FACTORS, registry=REGISTRY)
HTTP_SECONDS = Histogram(
    "vstar_http_seconds", "Of an answer's first byte", ["method", "route", "status"], buckets=HTTP, registry=REGISTRY
)

# the step a running job has done, and when; emptied as jobs end
_steps: dict[str, tuple[int, float]] = {}


def watch(**sources: Callable[[], float]) -> None:
    """Registers where gauges and counters of WATCHED are read, by their names without `vstar_`; KeyError for another name."""
    for name, read in sources.items():
        if f"vstar_{name}" not in WATCHED:
            raise KeyError(f"there is no metric vstar_{name}; there are {', '.join(WATCHED)}")
        WATCHING.sources[f"vstar_{name}"] = read


def accepted(job: Job) -> None:
    """Counts a job that the store holds."""
    ACCEPTED.inc()


def recovered(count: int) -> None:
    """Counts jobs that a start of the server found unfinished."""
    RECOVERED.inc(count)


def refused(code: str) -> None:
    """Counts a request for a video that made no job."""
    REFUSED.labels(code).inc()


def finished(job: Job, status: str, seconds: float) -> None:
    """Counts a job that ended, `seconds` after it was accepted; `status` is COMPLETED or one of `events.CODES`."""
    _steps.pop(job.id, None)
    FINISHED.labels(status).inc()
    JOB_SECONDS.labels(status).observe(seconds)


def event(job: Job, event: Event) -> None:
    """Measures what an engine tells of a job."""
    match event:
        case Started():
            QUEUE_SECONDS.observe(max(time.time() - job.created_at, 0.0))
            BATCH_SIZE.observe(event.batch)
        case Step():
            now = time.monotonic()
            before, at = _steps.get(job.id, (event.done, now))
            if event.done > before:
                STEP_SECONDS.observe((now - at) / (event.done - before))
            _steps[job.id] = event.done, now
        case Done():
            for stage, seconds in event.seconds.items():
                STAGE_SECONDS.labels(stage).observe(seconds)
            FRAMES.inc(event.frames)
            REAL_TIME.observe(sum(event.seconds.values()) * job.fps / event.frames)
    if isinstance(event, Done | Failed):
        _steps.pop(job.id, None)


def answered(method: str, route: str, status: int, seconds: float) -> None:
    """Measures an answer to a request; `route` is the path as it was declared, so that ids make no series of their own."""
    HTTP_SECONDS.labels(method, route, str(status)).observe(seconds)


def render() -> bytes:
    """Returns everything in Prometheus's text format, of the type CONTENT_TYPE."""
    return generate_latest(REGISTRY)
