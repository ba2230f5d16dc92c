"""A job: one video to make, serialisable as JSON."""

import re
import uuid
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vstar_engine.config.request import Request
from vstar_engine.config.sampling import Sampling, Tar
from vstar_engine.config.timeline import Position

# increased when a field of Job changes its meaning, so that jobs of an older server are not misread
VERSION = 1
ID = re.compile(r"video_[0-9a-f]{32}")


def new_id() -> str:
    """Returns a random id that cannot be guessed."""
    return f"video_{uuid.uuid4().hex}"


@dataclass(frozen=True)
class Job:
    """One video to make, and the key that asked for it.

    size: (height, width).
    tar: the fields of `config.Tar`; None: without TAR.
    embeddings: id of a precomputed bundle; the job repeats its states and negative prompts.
    priority: higher runs earlier.
    fingerprint: hash of the request's body.
    fast: the options of `config.Sampling.fast`.
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
        """Returns the job as plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Job":
        """Reads a job from `to_json`; TypeError for unknown or missing fields."""
        tuples = {f.name for f in fields(Job) if str(f.type).startswith("tuple")}
        given: dict[str, Any] = {name: tuple(value) if name in tuples else value for name, value in content.items()}
        return Job(**given)

    @property
    def shape(self) -> tuple[int, tuple[int, int], int, tuple[str, ...]]:
        """Returns what the jobs of one batch have in common: frames, size, steps and fast-sampling options."""
        return self.frames, self.size, self.steps, self.fast

    @property
    def work(self) -> int:
        """Returns the cost of a job: frames x pixels x steps."""
        return self.frames * self.size[0] * self.size[1] * self.steps

    def request(self) -> Request:
        """Returns the engine's request; ValueError for an invalid setting."""
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
    """Returns TAR as JSON, with its levels as strings."""
    if tar is None:
        return None
    sigma = {str(level): value for level, value in tar.sigma.items()}
    return {"sigma": sigma, "strength": tar.strength, "until_step": tar.until_step}


def tar_from(content: dict[str, Any] | None) -> Tar | None:
    """Reads TAR from `tar_json`."""
    if content is None:
        return None
    sigma = {int(level): value for level, value in content["sigma"].items()}
    return Tar(sigma, content["strength"], content["until_step"])
