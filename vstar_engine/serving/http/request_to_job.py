"""From a body to a job: defaults, units, a prompt's synopsis and every check that needs no engine."""

import asyncio
import hashlib
import json
import random
import re
import time
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.config.models import Spec
from vstar_engine.config.request import Request
from vstar_engine.config.sampling import Sampling, Tar, tar_of
from vstar_engine.config.video_fields import BODY, DEFAULT_PRESET, STATE, TAR, VideoField, fields_at
from vstar_engine.errors import CheckpointError, EndpointError
from vstar_engine.prompting.llm import Llm
from vstar_engine.prompting.synopsis import GIVEN, PROMPT, Synopsis, synopsize
from vstar_engine.serving.errors import SERVER, ApiError, invalid
from vstar_engine.serving.jobs.job import Job, new_id, tar_from, tar_json

from .schema import BUNDLE, LONGEST_STATE, MOST_STATES, CreateVideo, State, TarSettings, VideoSettings

if TYPE_CHECKING:
    from vstar_engine.prompting.embeddings import Embeddings

SEEDS = random.SystemRandom()


@dataclass(frozen=True)
class Resolver:
    """What bodies are read against: the model, the built engine that runs it, bundles of embeddings, whether and by whom a
    prompt's states are described where a body does not say, and the sampling where it does not.
    """

    spec: Spec
    artifact: BuiltEngine | None = None
    bundles: Path | None = None
    enhance: bool = True
    llm: Llm | None = None
    llm_required: bool = False
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.bundles is not None:  # PyTorch reads them and takes a second to load, which no request shall wait for
            import_module("vstar_engine.prompting.embeddings")

    def plain(self, body: VideoSettings, prompt: str | None, owner: str, fingerprint: str, id: str | None = None) -> Job:
        """Returns the job of a body before any language model or file is asked: its states are the given ones or its prompt."""
        if body.model not in (None, self.spec.name):
            raise ApiError(404, "model_not_found", f"this server has the model {self.spec.name!r} alone", "model")
        states = self._states(body, prompt)
        values = {**self._settings(body), **states}
        if values["negatives"]:
            values["negative"] = ""
        return Job(
            id=id or new_id(),
            key_id=owner,
            model=self.spec.name,
            prompt=prompt or next(iter(states["states"]), ""),
            created_at=time.time(),
            tar=tar_json(tar_from_body(body.tar, values["steps"], self.sampling.until)),
            embeddings=body.embeddings,
            priority=body.priority or 0,
            metadata=body.metadata or {},
            synopsis_source=GIVEN if body.states else PROMPT,
            fingerprint=fingerprint,
            **values,
        )

    def _settings(self, body: VideoSettings) -> dict[str, Any]:
        """Returns the settings at the top of a body by their names in a job, with the server's own where it does not say."""
        values: dict[str, Any] = {}
        for row in fields_at(BODY):
            said = getattr(body, row.http_name) if row.settable else None
            usual = getattr(self.sampling, row.name) if row.path.startswith("sampling.") else row.default()
            values[row.name] = usual if said is None else said
        values["size"] = self._size(body.size)
        values["frames"] = frames_of(body, values["fps"])
        values["seed"] = SEEDS.randrange(2**32) if body.seed is None else body.seed
        return values

    def _states(self, body: VideoSettings, prompt: str | None) -> dict[str, tuple[Any, ...]]:
        """Returns what a body says of each state, by the names in a job; ApiError where it says something of some alone."""
        if not body.states:
            return {**{row.name: () for row in fields_at(STATE)}, "states": () if prompt is None else (prompt,)}
        states = [State(text=state) if isinstance(state, str) else state for state in body.states]
        said: dict[str, list[Any]] = {row.name: [getattr(state, row.http_name) for state in states] for row in fields_at(STATE)}
        if any(said["negatives"]):
            said["negatives"] = [own or body.negative_prompt or "" for own in said["negatives"]]
        else:
            said["negatives"] = []
        if said["durations"][-1] is None:  # the way from the last state leads nowhere
            said["durations"].pop()
        return {row.name: _of_each(row, said[row.name]) for row in fields_at(STATE)}

    def _size(self, text: str | None) -> tuple[int, int]:
        if text is None:
            built = self.artifact.identity["size"] if self.artifact is not None else None
            return tuple(built) if built else self.spec.size
        width, _, height = text.partition("x")
        try:
            self.spec.check_size(int(height), int(width))
        except ValueError as error:
            each = self.spec.multiple
            raise invalid(
                f"size is WIDTHxHEIGHT, both multiples of {each} for model {self.spec.name}, got {text}", "size"
            ) from error
        return int(height), int(width)

    async def told(self, job: Job, body: VideoSettings) -> Job:
        """Returns the job with the states of its prompt or its bundle, checked as the engine will."""
        if job.embeddings is not None:
            job = await asyncio.to_thread(self._from_bundle, job)
        elif not body.states and (self.enhance if body.enhance_prompt is None else body.enhance_prompt):
            job = await self._synopsis(job)
        self.check(job)
        return job

    async def _synopsis(self, job: Job) -> Job:
        most = min(MOST_STATES, job.frames)
        try:
            if self.llm is None:
                synopsis = synopsize(job.prompt, most=most)
            else:
                synopsis = await asyncio.to_thread(synopsize, job.prompt, None, most, self.llm, self.llm_required)
        except EndpointError as error:
            message = "the language model that describes prompts gives no answer; give a synopsis, or enhance_prompt: false"
            raise ApiError(503, "prompt_not_enhanced", message, "enhance_prompt", SERVER, {"Retry-After": "5"}) from error
        states: dict[str, Any] = {"states": tuple(state[:LONGEST_STATE] for state in synopsis.states)}
        return replace(job, synopsis_source=synopsis.source, **states)

    def _from_bundle(self, job: Job) -> Job:
        bundle = self.bundle(job.embeddings or "")
        synopsis: Synopsis = bundle.synopsis
        states: dict[str, Any] = {row.name: getattr(synopsis, row.name) for row in fields_at(STATE)}
        states["negative"] = bundle.negative_prompt
        return replace(job, prompt=job.prompt or synopsis.prompt, synopsis_source=synopsis.source, **states)

    def bundle(self, id: str) -> "Embeddings":
        """Reads the bundle of an id; ApiError where the operator put none of that name."""
        path = bundle_path(self.bundles, id)
        if path is None or not path.is_file():
            raise invalid(f"there are no embeddings {id!r} on this server", "embeddings", "embeddings_not_found")
        from vstar_engine.prompting.embeddings import Embeddings

        try:
            return Embeddings.read(path)
        except CheckpointError as error:
            raise invalid(f"the embeddings {id!r} cannot be used: they are damaged or of another kind", "embeddings") from error

    def check(self, job: Job) -> None:
        """Raises ApiError for what the engine would refuse."""
        try:
            request = job.request().fitted(self.spec)
            if self.artifact is not None:
                self.artifact.check_requests(request)
        except ValueError as error:
            raise invalid(str(error)) from error


def _of_each(row: VideoField, said: list[Any]) -> tuple[Any, ...]:
    """Returns what states say of one setting; ApiError where some do and others do not, or where it cannot be read."""
    given = [value for value in said if value is not None]
    if given and len(given) < len(said):
        but = ", or to all but the last" if row.name == "durations" else ""
        raise invalid(f"`{row.http_name}` stands at some states only; give it to all{but}, or to none", "synopsis")
    try:
        return tuple(row.parse(value) if row.parse and isinstance(value, str) else value for value in given)
    except ValueError as error:
        raise invalid(str(error), "synopsis") from error


def bundle_path(folder: Path | None, id: str) -> Path | None:
    """Names the file of a bundle's id; None for an id that could be a path."""
    return folder / f"{id}.safetensors" if folder is not None and re.fullmatch(BUNDLE, id) else None


def frames_of(body: VideoSettings, fps: float) -> int:
    """Returns the number of frames: as said, else as long as `seconds`, else the engine's default."""
    if body.num_frames is not None:
        return body.num_frames
    return max(1, round(int(body.seconds) * fps)) if body.seconds is not None else Request.frames


def tar_from_body(given: str | TarSettings | None, steps: int, until: str = Sampling().until) -> Tar | None:
    """Returns a preset with single settings on top of it, as on the command line; ApiError for one that makes no sense."""
    given = TarSettings(preset=given) if isinstance(given, str) else given or TarSettings()
    said = {row.name: getattr(given, row.http_name) for row in fields_at(TAR)}
    values = {"tar": DEFAULT_PRESET, "sigma": {}, "until_step": until} | {k: v for k, v in said.items() if v is not None}
    sigma = values.pop("sigma")
    levels = sigma if isinstance(sigma, dict) else {0: sigma}
    try:
        return tar_of(
            values.pop("tar"), {int(level): value for level, value in levels.items()}, values.pop("until_step"), steps, **values
        )
    except ValueError as error:
        raise invalid(str(error), "tar") from error


def fingerprint(kind: str, body: VideoSettings) -> str:
    """Hashes what a body asks for, so that a repeated request is known."""
    said = json.dumps([kind, body.model_dump(mode="json", exclude_none=True)], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def remixed(job: Job, body: VideoSettings, prompt: str) -> CreateVideo:
    """Returns the body that makes a job again with another prompt and what else is said anew."""
    before: dict[str, Any] = {row.http_name: job.shown()[row.http_name] for row in fields_at(BODY) if row.settable}
    before |= {"priority": job.priority, "metadata": job.metadata, "tar": _body_tar(tar_from(job.tar))}
    if body.embeddings is not None:
        del before["negative_prompt"]
    if body.seconds is not None:
        del before["num_frames"]
    return CreateVideo(**{**before, **body.model_dump(exclude_none=True), "prompt": prompt})


def _body_tar(tar: Tar | None) -> str | dict[str, Any]:
    """Returns what a body says of TAR; its levels are on top of the preset without any."""
    if tar is None:
        return "none"
    said = {row.http_name: getattr(tar, row.name) for row in fields_at(TAR) if row.path != "tar"}
    return {**said, "preset": "none", "sigma": {str(level): sigma for level, sigma in tar.sigma.items()}}
