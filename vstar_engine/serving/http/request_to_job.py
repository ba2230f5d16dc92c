"""Turns the body of a request into a job: defaults, units, states, and all checks that need no engine."""

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

from .other_clients import DRAWN, SEED_RANGE
from .schema import BUNDLE, LONGEST_STATE, MOST_STATES, CreateVideo, State, TarSettings, VideoSettings

if TYPE_CHECKING:
    from vstar_engine.prompting.embeddings import Embeddings

SEEDS = random.SystemRandom()


@dataclass(frozen=True)
class Resolver:
    """Turns bodies into jobs for a model.

    `artifact` is the built engine that runs it and `bundles` the folder of embeddings. `enhance` sets whether a prompt is
    turned into states by default, `llm` by which language model. `sampling` has the defaults of sampling.
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
        """Returns the job of a body with its given states, or its prompt as the only state; reads no file."""
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
        """Returns the settings at the top of a body, by their names in a job, with the server's defaults."""
        values: dict[str, Any] = {}
        for row in fields_at(BODY):
            said = getattr(body, row.http_name) if row.settable else None
            usual = getattr(self.sampling, row.name) if row.path.startswith("sampling.") else row.default()
            values[row.name] = usual if said is None else said
        values["size"] = self._size(body.size)
        values["frames"] = frames_of(body, values["fps"])
        values["seed"] = SEEDS.randrange(SEED_RANGE) if body.seed in (None, DRAWN) else body.seed
        return values

    def _states(self, body: VideoSettings, prompt: str | None) -> dict[str, tuple[Any, ...]]:
        """Returns the states of a body and their settings, by their names in a job; ApiError when only some have one."""
        if not body.states:
            return {**{row.name: () for row in fields_at(STATE)}, "states": () if prompt is None else (prompt,)}
        states = [State(text=state) if isinstance(state, str) else state for state in body.states]
        said: dict[str, list[Any]] = {row.name: [getattr(state, row.http_name) for state in states] for row in fields_at(STATE)}
        if any(said["negatives"]):
            said["negatives"] = [own or body.negative_prompt or "" for own in said["negatives"]]
        else:
            said["negatives"] = []
        if said["durations"][-1] is None:  # the last state has no next one to be a distance from
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

    async def with_states(self, job: Job, body: VideoSettings) -> Job:
        """Returns the checked job with the states of its prompt or its embeddings."""
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
        """Reads embeddings by their id; ApiError when the server has none of that id."""
        path = bundle_path(self.bundles, id)
        if path is None or not path.is_file():
            raise invalid(f"there are no embeddings {id!r} on this server", "embeddings", "embeddings_not_found")
        from vstar_engine.prompting.embeddings import Embeddings

        try:
            return Embeddings.read(path)
        except CheckpointError as error:
            raise invalid(f"the embeddings {id!r} cannot be used: they are damaged or of another kind", "embeddings") from error

    def check(self, job: Job) -> None:
        """Raises ApiError for a request that the engine would refuse."""
        try:
            request = job.request().fitted(self.spec)
            if self.artifact is not None:
                self.artifact.check_requests(request)
        except ValueError as error:
            raise invalid(str(error)) from error


def _of_each(row: VideoField, said: list[Any]) -> tuple[Any, ...]:
    """Returns one setting of all states; ApiError when only some have it or it cannot be read."""
    given = [value for value in said if value is not None]
    if given and len(given) < len(said):
        but = ", or to all but the last" if row.name == "durations" else ""
        raise invalid(f"`{row.http_name}` stands at some states only; give it to all{but}, or to none", "synopsis")
    try:
        return tuple(row.parse(value) if row.parse and isinstance(value, str) else value for value in given)
    except ValueError as error:
        raise invalid(str(error), "synopsis") from error


def bundle_path(folder: Path | None, id: str) -> Path | None:
    """Returns the file of embeddings by their id; None for an id that could be a path."""
    return folder / f"{id}.safetensors" if folder is not None and re.fullmatch(BUNDLE, id) else None


def frames_of(body: VideoSettings, fps: float) -> int:
    """Returns the number of frames: `num_frames`, else `seconds` at the frame rate, else the default."""
    if body.num_frames is not None:
        return body.num_frames
    return max(1, round(int(body.seconds) * fps)) if body.seconds is not None else Request.frames


def tar_from_body(given: str | TarSettings | None, steps: int, until: str = Sampling().until) -> Tar | None:
    """Returns the TAR of a body; ApiError for a setting that makes no sense."""
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
    """Returns a hash of a body, by which a repeated request is recognised."""
    said = json.dumps([kind, body.model_dump(mode="json", exclude_none=True)], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def remixed(job: Job, body: VideoSettings, prompt: str) -> CreateVideo:
    """Returns the body of a remix: the settings of a job, overridden by those of `body`, with another prompt."""
    before: dict[str, Any] = {row.http_name: job.shown()[row.http_name] for row in fields_at(BODY) if row.settable}
    before |= {"priority": job.priority, "metadata": job.metadata, "tar": _body_tar(tar_from(job.tar))}
    if body.embeddings is not None:
        del before["negative_prompt"]
    if body.seconds is not None:
        del before["num_frames"]
    return CreateVideo(**{**before, **body.model_dump(exclude_none=True), "prompt": prompt})


def _body_tar(tar: Tar | None) -> str | dict[str, Any]:
    """Returns TAR as a body has it: the preset `none` and its own levels on top."""
    if tar is None:
        return "none"
    said = {row.http_name: getattr(tar, row.name) for row in fields_at(TAR) if row.path != "tar"}
    return {**said, "preset": "none", "sigma": {str(level): sigma for level, sigma in tar.sigma.items()}}
