"""What an engine tells of a job, and the protocol of engines: all that the server knows of where videos are made."""

from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

from .job import Job

# what a job can fail with
OUT_OF_MEMORY, WORKER_CRASHED, WORKER_HUNG = "out_of_memory", "worker_crashed", "worker_hung"
INVALID_REQUEST, CANCELLED = "invalid_request", "cancelled"
STORAGE_FULL, GENERATION_FAILED = "storage_full", "generation_failed"
CODES = (OUT_OF_MEMORY, WORKER_CRASHED, WORKER_HUNG, INVALID_REQUEST, CANCELLED, STORAGE_FULL, GENERATION_FAILED)

STAGES = ("text", "denoise", "decode", "encode")


@dataclass(frozen=True)
class Event:
    """Something that happened to a job; fields are plain JSON values."""

    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class Started(Event):
    """The job left the engine's queue and runs in a batch of `batch` jobs, itself counted."""

    kind = "started"
    batch: int


@dataclass(frozen=True)
class Stage(Event):
    """One of STAGES began."""

    kind = "stage"
    name: str


@dataclass(frozen=True)
class Step(Event):
    """A denoising step is done; `preview` is a data URL of a small strip of frames, at most twice a second."""

    kind = "step"
    done: int
    total: int
    seconds_left: float | None = None
    preview: str | None = None


@dataclass(frozen=True)
class Done(Event):
    """The video lies complete, synced and renamed in the results folder under the name `file`."""

    kind = "done"
    file: str
    bytes: int
    sha256: str
    frames: int
    width: int
    height: int
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed(Event):
    """The job ended without a video; `code` is one of CODES, `retry` says whether another try may help."""

    kind = "failed"
    code: str
    message: str
    retry: bool = False


KINDS: dict[str, type[Event]] = {event.kind: event for event in (Started, Stage, Step, Done, Failed)}


def event_from(content: dict[str, Any]) -> Event:
    """Reads what `Event.to_json` wrote; ValueError for another kind, TypeError for other fields."""
    fields = dict(content)
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"an event is one of {', '.join(KINDS)}, got {kind!r}")
    return KINDS[kind](**fields)


class EngineClient(Protocol):
    """An engine somewhere else: in a child process, or on other machines."""

    async def start(self) -> None:
        """Loads the model and warms every bucket; returns when the engine is ready."""

    async def run(self) -> None:
        """Goes on until the engine is closed; raises what broke it."""

    @property
    def ready(self) -> bool:
        """False before `start` returned and while a worker is being started again."""

    def submit(self, job: Job) -> AsyncIterator[Event]:
        """Makes a job's video; the stream ends after Done or Failed."""

    async def cancel(self, id: str) -> None:
        """Stops a job within one step: its stream ends with Failed("cancelled"). An unknown id is no error."""

    async def close(self, grace: float) -> None:
        """Ends the engine; running jobs have `grace` seconds."""

    def facts(self) -> dict[str, Any]:
        """Describes the model and its limits: see FACTS."""


# keys of `EngineClient.facts`, all there once `start` has returned
FACTS = {
    "model": "name of the model",
    "weights": "sha256, or name, of its weights",
    "backend": "which back end runs the UNet",
    "device": "where it runs",
    "dtype": "in which numbers",
    "size": "[height, width] the model was made for",
    "multiple": "both sides are multiples of this many pixels",
    "levels": "levels of the UNet that TAR may name",
    "max_frames": "longest clip",
    "text": "whether the engine has its text tower, else embeddings are needed",
    "batch_limits": 'measured at warm-up: {"FRAMESxHEIGHTxWIDTH": largest batch}; other clips are not batched',
    "step_seconds": "measured at warm-up: seconds of one step of the model's own size and 16 frames, None if unknown",
    "counters": "since the start: restarts, retried, batches, batched_jobs, between, cache_hits, cache_misses; "
    "now: waiting, running, workers, cache_bytes",
}
