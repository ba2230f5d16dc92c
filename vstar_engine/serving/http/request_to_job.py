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
from vstar_engine.config.sampling import Sampling, Tar, tar_named, until_step
from vstar_engine.config.timeline import Position, parse_position
from vstar_engine.errors import CheckpointError, EndpointError
from vstar_engine.prompting.llm import Llm
from vstar_engine.prompting.synopsis import GIVEN, PROMPT, Synopsis, synopsize
from vstar_engine.serving.errors import SERVER, ApiError, invalid
from vstar_engine.serving.jobs.job import Job, new_id, tar_from, tar_json

from .schema import BUNDLE, LONGEST_STATE, MOST_STATES, CreateVideo, State, TarSettings, Wishes

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

    def plain(self, body: Wishes, prompt: str | None, owner: str, fingerprint: str, id: str | None = None) -> Job:
        """Returns the job of a body before any language model or file is asked: the prompt stands in for its states."""
        if body.model not in (None, self.spec.name):
            raise ApiError(404, "model_not_found", f"this server has the model {self.spec.name!r} alone", "model")
        states, at, durations, negatives = self._given(body, prompt)
        fps = body.fps if body.fps is not None else Request.fps
        usual = self.sampling
        steps = body.num_inference_steps or usual.steps
        return Job(
            id=id or new_id(),
            key_id=owner,
            model=self.spec.name,
            prompt=prompt or states[0],
            states=states,
            frames=frames_of(body, fps),
            size=self._size(body.size),
            created_at=time.time(),
            seed=SEEDS.randrange(2**32) if body.seed is None else body.seed,
            fps=fps,
            steps=steps,
            guidance=usual.guidance if body.guidance_scale is None else body.guidance_scale,
            eta=usual.eta if body.eta is None else body.eta,
            tar=tar_json(tar_of(body.tar, steps, usual.until)),
            negative="" if negatives else body.negative_prompt or "",
            negatives=negatives,
            at=at,
            durations=durations,
            mode=body.spread or Request.mode,
            embeddings=body.embeddings,
            priority=body.priority or 0,
            metadata=body.metadata or {},
            synopsis_source=GIVEN if body.states else PROMPT,
            fingerprint=fingerprint,
            fast=usual.fast,
        )

    def _given(
        self, body: Wishes, prompt: str | None
    ) -> tuple[tuple[str, ...], tuple[Position, ...], tuple[float, ...], tuple[str, ...]]:
        if not body.states:
            return (prompt or "",), (), (), ()
        states = [State(text=state) if isinstance(state, str) else state for state in body.states]
        placed = [state.at for state in states if state.at is not None]
        if placed and len(placed) < len(states):
            raise invalid("`at` stands at some states only; give it to all or to none", "synopsis")
        try:
            at = tuple(parse_position(place) if isinstance(place, str) else place for place in placed)
        except ValueError as error:
            raise invalid(str(error), "synopsis") from error
        durations = [state.duration for state in states]
        given = durations[:-1] if durations and durations[-1] is None else durations
        if any(duration is None for duration in given) and any(duration is not None for duration in durations):
            raise invalid("`duration` stands at some states only; give it to all, or all but the last, or none", "synopsis")
        negatives = tuple(state.negative or body.negative_prompt or "" for state in states)
        return (
            tuple(state.text for state in states),
            at,
            tuple(duration for duration in given if duration is not None),
            negatives if any(state.negative for state in states) else (),
        )

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

    async def told(self, job: Job, body: Wishes) -> Job:
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
        states = tuple(state[:LONGEST_STATE] for state in synopsis.states)
        return replace(job, states=states, synopsis_source=synopsis.source)

    def _from_bundle(self, job: Job) -> Job:
        bundle = self.bundle(job.embeddings or "")
        synopsis: Synopsis = bundle.synopsis
        return replace(
            job,
            prompt=job.prompt or synopsis.prompt,
            states=synopsis.states,
            at=synopsis.at,
            durations=synopsis.durations,
            negative=bundle.negative_prompt,
            negatives=synopsis.negatives,
            synopsis_source=synopsis.source,
        )

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


def bundle_path(folder: Path | None, id: str) -> Path | None:
    """Names the file of a bundle's id; None for an id that could be a path."""
    return folder / f"{id}.safetensors" if folder is not None and re.fullmatch(BUNDLE, id) else None


def frames_of(body: Wishes, fps: float) -> int:
    """Returns the number of frames: as said, else as long as `seconds`, else the engine's default."""
    if body.num_frames is not None:
        return body.num_frames
    return max(1, round(int(body.seconds) * fps)) if body.seconds is not None else Request.frames


def tar_of(given: str | TarSettings | None, steps: int, until: str = Sampling().until) -> Tar | None:
    """Returns a preset with single settings on top of it, as on the command line; of the preset `none` only what is given."""
    given = TarSettings(preset=given) if isinstance(given, str) else given or TarSettings()
    try:
        tar = Tar() if given.preset is None else tar_named(given.preset)
        if given.sigma is not None:
            levels = given.sigma if isinstance(given.sigma, dict) else {"0": given.sigma}
            before = tar.sigma if tar else {}
            tar = replace(tar or Tar(), sigma={**before, **{int(level): sigma for level, sigma in levels.items()}})
        if tar is None:
            return None
        strength = tar.strength if given.strength is None else given.strength
        return replace(tar, strength=strength, until_step=until_step(until if given.until is None else given.until, steps))
    except ValueError as error:
        raise invalid(str(error), "tar") from error


def fingerprint(kind: str, body: Wishes) -> str:
    """Hashes what a body asks for, so that a repeated request is known."""
    said = json.dumps([kind, body.model_dump(mode="json", exclude_none=True)], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def remixed(job: Job, body: Wishes, prompt: str) -> CreateVideo:
    """Returns the body that makes a job again with another prompt and what else is said anew."""
    height, width = job.size
    before: dict[str, Any] = {
        "num_frames": job.frames,
        "size": f"{width}x{height}",
        "fps": job.fps,
        "spread": job.mode,
        "num_inference_steps": job.steps,
        "guidance_scale": job.guidance,
        "eta": job.eta,
        "seed": job.seed,
        "priority": job.priority,
        "metadata": job.metadata,
        "negative_prompt": job.negative if body.embeddings is None else None,
        "tar": "none" if (tar := tar_from(job.tar)) is None else _spelled(tar),
    }
    if body.seconds is not None:
        del before["num_frames"]
    return CreateVideo(**{**before, **body.model_dump(exclude_none=True), "prompt": prompt})


def _spelled(tar: Tar) -> dict[str, Any]:
    sigma = {str(level): sigma for level, sigma in tar.sigma.items()}
    return {"preset": "none", "sigma": sigma, "strength": tar.strength, "until": tar.until_step}
