"""A job: one video to make, as plain JSON values that outlive the process."""

import re
import uuid
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vstar_engine.config.request import Request
from vstar_engine.config.sampling import Sampling, Tar
from vstar_engine.config.timeline import Position

# raised when the fields of a job change their meaning, so that an older server's jobs are not read wrongly
VERSION = 1
ID = re.compile(r"video_[0-9a-f]{32}")


def new_id() -> str:
    """Makes an id nobody can guess."""
    return f"video_{uuid.uuid4().hex}"


@dataclass(frozen=True)
class Job:
    """One video to make and whose it is. `size` is (height, width); `tar` holds the fields of `config.Tar`, None for none.

    `embeddings` is the id of a precomputed bundle, whose states and negatives the job repeats. Higher `priority` runs earlier.
    `fingerprint` hashes the body that asked for it. `fast` is `config.Sampling`'s.
    """

    id: str
    key_id: str
    model: str
    prompt: str
    states: tuple[str, ...]
    frames: int
    size: tuple[int, int]
    created_at: float
    seed: int = 0
    fps: float = 8.0
    steps: int = Sampling.steps
    guidance: float = Sampling.guidance
    eta: float = Sampling.eta
    tar: dict[str, Any] | None = None
    negative: str = ""
    negatives: tuple[str, ...] = ()
    at: tuple[Position, ...] = ()
    durations: tuple[float, ...] = ()
    mode: str = "linear"
    embeddings: str | None = None
    priority: int = 0
    metadata: dict[str, str] = field(default_factory=dict)
    synopsis_source: str = "given"
    remixed_from: str | None = None
    fingerprint: str = ""
    fast: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values that `from_json` reads back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Job":
        """Reads what `to_json` wrote; TypeError for other fields."""
        tuples = {f.name for f in fields(Job) if str(f.type).startswith("tuple")}
        given: dict[str, Any] = {name: tuple(value) if name in tuples else value for name, value in content.items()}
        return Job(**given)

    @property
    def shape(self) -> tuple[int, tuple[int, int], int, tuple[str, ...]]:
        """Returns what the jobs of one batch have in common: frames, size, steps and fast-sampling options."""
        return self.frames, self.size, self.steps, self.fast

    @property
    def work(self) -> int:
        """Measures what a job costs: frames x pixels x steps."""
        return self.frames * self.size[0] * self.size[1] * self.steps

    def request(self) -> Request:
        """Returns the engine's request; ValueError where a setting makes no sense."""
        sampling = Sampling(steps=self.steps, eta=self.eta, guidance=self.guidance, fast=self.fast)
        return Request(
            self.states,
            self.frames,
            self.seed,
            self.size,
            sampling,
            tar_from(self.tar),
            self.negative,
            self.mode,
            self.fps,
            self.at,
            self.durations,
            self.negatives,
        )


def tar_json(tar: Tar | None) -> dict[str, Any] | None:
    """Returns TAR as JSON, its levels as words."""
    if tar is None:
        return None
    sigma = {str(level): value for level, value in tar.sigma.items()}
    return {"sigma": sigma, "strength": tar.strength, "until_step": tar.until_step}


def tar_from(content: dict[str, Any] | None) -> Tar | None:
    """Reads what `tar_json` wrote."""
    if content is None:
        return None
    sigma = {int(level): value for level, value in content["sigma"].items()}
    return Tar(sigma, content["strength"], content["until_step"])
