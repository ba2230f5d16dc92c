"""A job: one video to make, as plain values that are stored."""

import re
import uuid
from dataclasses import MISSING, asdict, dataclass, field, fields, make_dataclass
from typing import Any

from vstar_engine.config.request import Request
from vstar_engine.config.sampling import Tar
from vstar_engine.config.video_fields import BODY, STATE, fields_at, request_from
from vstar_engine.config.windows import FIFO, WindowPlan

# increased when a field of Job changes its meaning, so that jobs of an older server are not misread
VERSION = 1
ID = re.compile(r"video_[0-9a-f]{32}")


def new_id() -> str:
    """Returns a random id that cannot be guessed."""
    return f"video_{uuid.uuid4().hex}"


# what a job is scheduled by, and no default can stand in for
REQUIRED = ("states", "frames", "size")
# the settings that the HTTP API knows, by their names: `job.frames`, `job.steps`, `job.states` ...; TAR's are one dictionary
STORED = [*fields_at(STATE), *fields_at(BODY)]
_Settings: Any = make_dataclass(
    "_Settings",
    [(row.name, row.declared.type, field(default=MISSING if row.name in REQUIRED else row.default())) for row in STORED],
    frozen=True,
    kw_only=True,
)


@dataclass(frozen=True, kw_only=True)
class Job(_Settings):
    """One video to make and its owner, with a field for each setting of `STORED`.

    `tar` holds the fields of `config.Tar`, None for none. `embeddings` is the id of a precomputed bundle, whose states and
    negatives the job repeats. Higher `priority` runs earlier. `fingerprint` hashes the body that asked for it.
    """

    id: str
    key_id: str
    model: str
    prompt: str
    created_at: float
    tar: dict[str, Any] | None = None
    embeddings: str | None = None
    priority: int = 0
    metadata: dict[str, str] = field(default_factory=dict)
    synopsis_source: str = "given"
    remixed_from: str | None = None
    fingerprint: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the job as plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Job":
        """Reads a job from `to_json`; TypeError for unknown or missing fields."""
        tuples = {f.name for f in fields(Job) if str(f.type).startswith("tuple")}
        given: dict[str, Any] = {name: tuple(value) if name in tuples else value for name, value in content.items()}
        return Job(**given)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Returns what jobs of one batch share: frames, size, steps, lossy options and windows; a queue has one job."""
        alone = (self.id,) if self.blend == FIFO else ()
        return self.frames, self.size, self.steps, self.fast, self.window, self.overlap, self.blend, *alone

    @property
    def work(self) -> int:
        """Returns the cost of a job: frames x pixels x steps; of windows, the frames of all of them."""
        whole = self.window is None or self.window >= self.frames
        frames = self.frames if whole else WindowPlan(self.frames, self.window, self.overlap).computed
        return frames * self.size[0] * self.size[1] * self.steps

    def shown(self) -> dict[str, Any]:
        """Returns the settings at the top of the video object, by their names there."""
        return {row.http_name: row.to_http(getattr(self, row.name)) for row in fields_at(BODY)}

    def request(self) -> Request:
        """Returns the engine's request; ValueError where a setting makes no sense."""
        return request_from({**{row.path: getattr(self, row.name) for row in STORED}, "tar": tar_from(self.tar)})


def tar_json(tar: Tar | None) -> dict[str, Any] | None:
    """Returns TAR as plain JSON values, with text for levels."""
    if tar is None:
        return None
    return {**vars(tar), "sigma": {str(level): value for level, value in tar.sigma.items()}}


def tar_from(content: dict[str, Any] | None) -> Tar | None:
    """Reads TAR from `tar_json`."""
    if content is None:
        return None
    return Tar(**{**content, "sigma": {int(level): value for level, value in content["sigma"].items()}})
