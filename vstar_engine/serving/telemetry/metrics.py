"""The metrics that Prometheus scrapes from `/metrics`."""

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

# bucket bounds; a mini clip takes a second, a long one on one GPU an hour
LONG = (0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 240, 480, 900, 1800, 3600)
SHORT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 60)
HTTP = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)
FACTORS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCHES = (1, 2, 4, 8, 16, 32)

# the metrics that are read from a source when scraped: kind and description
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
    """Reads every registered source when Prometheus scrapes."""

    def __init__(self) -> None:
        self.sources: dict[str, Callable[[], float]] = {}

    def collect(self) -> Iterable[Metric]:
        for name, read in self.sources.items():
            family, help = WATCHED[name]
            yield family(name, help, value=read())


class Metrics:
    """The metrics of one server."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.registry = registry = CollectorRegistry()
        self._clock, self._watched = clock, Watched()
        # the last step of each running job, and when it was done; emptied as jobs end
        self._steps: dict[str, tuple[int, float]] = {}
        registry.register(self._watched)
        ProcessCollector(registry=registry)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(name, help, labels, registry=registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, help, labels, buckets=buckets, registry=registry)

        self._accepted = counter("vstar_jobs_accepted", "Jobs taken into the store")
        self._refused = counter("vstar_jobs_refused", "Requests for a video that were not taken, by error code", "code")
        self._finished = counter("vstar_jobs_finished", "Jobs that ended: completed, or the code they failed with", "status")
        self._recovered = counter("vstar_jobs_recovered", "Jobs taken up again after a restart")
        self._frames = counter("vstar_frames", "Frames of completed videos")
        self._job = histogram("vstar_job_seconds", "From acceptance to the end of a job", LONG, "status")
        self._queue = histogram("vstar_queue_seconds", "From acceptance to the engine", LONG)
        self._stage = histogram("vstar_stage_seconds", "Of a stage of a video", LONG, "stage")
        self._step = histogram("vstar_step_seconds", "Between two denoising steps of a job", SHORT)
        self._batch = histogram("vstar_batch_size", "Size of a job's batch, observed once per job", BATCHES)
        self._real_time = histogram("vstar_real_time_factor", "Seconds of work for a second of video", FACTORS)
        self._http = histogram("vstar_http_seconds", "Of an answer's first byte", HTTP, "method", "route", "status")

    def watch(self, **sources: Callable[[], float]) -> None:
        """Registers the sources of metrics in WATCHED, by their names without `vstar_`; KeyError for another name."""
        for name, read in sources.items():
            if f"vstar_{name}" not in WATCHED:
                raise KeyError(f"there is no metric vstar_{name}; there are {', '.join(WATCHED)}")
            self._watched.sources[f"vstar_{name}"] = read

    def accepted(self) -> None:
        """Counts a job that the store holds."""
        self._accepted.inc()

    def recovered(self, count: int) -> None:
        """Counts jobs that a start of the server found unfinished."""
        self._recovered.inc(count)

    def refused(self, code: str) -> None:
        """Counts a request for a video that was refused."""
        self._refused.labels(code).inc()

    def finished(self, job: Job, status: str, seconds: float) -> None:
        """Counts a job that ended `seconds` after it was accepted; `status` is COMPLETED or one of `events.CODES`."""
        self._steps.pop(job.id, None)
        self._finished.labels(status).inc()
        self._job.labels(status).observe(seconds)

    def event(self, job: Job, event: Event) -> None:
        """Measures an event of a job."""
        match event:
            case Started():
                self._queue.observe(max(time.time() - job.created_at, 0.0))
                self._batch.observe(event.batch)
            case Step():
                now = self._clock()
                before, at = self._steps.get(job.id, (event.done, now))
                if event.done > before:
                    self._step.observe((now - at) / (event.done - before))
                self._steps[job.id] = event.done, now
            case Done():
                for stage, seconds in event.seconds.items():
                    self._stage.labels(stage).observe(seconds)
                self._frames.inc(event.frames)
                self._real_time.observe(sum(event.seconds.values()) * job.fps / event.frames)
        if isinstance(event, Done | Failed):
            self._steps.pop(job.id, None)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Measures an HTTP response. `route` is the declared path, so that ids create no series."""
        self._http.labels(method, route, str(status)).observe(seconds)

    def render(self) -> bytes:
        """Returns all metrics in Prometheus's text format, of the type CONTENT_TYPE."""
        return generate_latest(self.registry)
