"""The events of a job, and the protocol of the engine that makes videos for the server."""

from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

from .job import Job

# codes of failed jobs
OUT_OF_MEMORY, WORKER_CRASHED, WORKER_HUNG = "out_of_memory", "worker_crashed", "worker_hung"
INVALID_REQUEST, CANCELLED = "invalid_request", "cancelled"
STORAGE_FULL, GENERATION_FAILED = "storage_full", "generation_failed"
CODES = (OUT_OF_MEMORY, WORKER_CRASHED, WORKER_HUNG, INVALID_REQUEST, CANCELLED, STORAGE_FULL, GENERATION_FAILED)

STAGES = ("text", "denoise", "decode", "encode")


@dataclass(frozen=True)
class Event:
    """Something that happened to a job; its fields are plain JSON values."""

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
    """A stage began: one of STAGES."""

    kind = "stage"
    name: str


@dataclass(frozen=True)
class Step(Event):
    """A denoising step is done. `preview` is a data URL of a small strip of frames, sent at most twice a second."""

    kind = "step"
    done: int
    total: int
    seconds_left: float | None = None
    preview: str | None = None


@dataclass(frozen=True)
class Part(Event):
    """A window of a denoising step is done: `done` of `total`."""

    kind = "part"
    done: int
    total: int


@dataclass(frozen=True)
class Done(Event):
    """The video is complete: `file` in the results folder, synced to the disk."""

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
    """The job ended without a video. `code` is one of CODES; `retry` says whether another try may succeed."""

    kind = "failed"
    code: str
    message: str
    retry: bool = False


KINDS: dict[str, type[Event]] = {event.kind: event for event in (Started, Stage, Step, Part, Done, Failed)}


def event_from(content: dict[str, Any]) -> Event:
    """Reads an event from `Event.to_json`; ValueError for an unknown kind, TypeError for unknown fields."""
    fields = dict(content)
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"an event's kind is one of {', '.join(KINDS)}, got {kind!r}")
    return KINDS[kind](**fields)


class EngineClient(Protocol):
    """An engine in a child process or on other machines."""

    async def start(self) -> None:
        """Loads the model and warms every bucket; returns once the engine is ready."""

    async def run(self) -> None:
        """Runs until the engine is closed; raises the error that stopped it."""

    @property
    def ready(self) -> bool:
        """Returns whether a worker is ready: false before `start` returned and while the only worker restarts."""

    def submit(self, job: Job) -> AsyncIterator[Event]:
        """Yields a job's events; the last is Done or Failed."""

    async def cancel(self, id: str) -> None:
        """Cancels a job within one step: its events end with Failed("cancelled"). An unknown id is ignored."""

    async def close(self, grace: float) -> None:
        """Stops the engine; running jobs have `grace` seconds to end."""

    def facts(self) -> dict[str, Any]:
        """Returns the model, its limits and the counters; see FACTS."""


# the keys of `EngineClient.facts`, all present once `start` has returned
FACTS = {
    "model": "name of the model",
    "weights": "sha256, or name, of its weights",
    "backend": "back end of the UNet",
    "device": "device of the UNet",
    "dtype": "data type of the UNet",
    "size": "[height, width] the model was made for",
    "multiple": "height and width are multiples of this number of pixels",
    "levels": "levels of the UNet that TAR may name",
    "max_frames": "longest clip",
    "text": "whether the engine has a text encoder; without one it needs embeddings",
    "batch_limits": 'measured at warm-up: {"FRAMESxHEIGHTxWIDTH": largest batch}; other clips are not batched',
    "step_seconds": "measured at warm-up: seconds of one step of the model's own size and 16 frames, None if unknown",
    "counters": "since the start: restarts, retried, batches, batched_jobs, between, cache_hits, cache_misses; "
    "now: waiting, running, workers, cache_bytes",
}
