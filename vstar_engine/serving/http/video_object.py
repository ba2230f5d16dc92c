"""A job as the API shows it: the stored job, updated by its progress."""

from itertools import islice, zip_longest
from typing import Any

from vstar_engine.serving.jobs.job import Job
from vstar_engine.serving.jobs.progress import COMPLETED, FAILED, QUEUED, RUNNING, JobProgress
from vstar_engine.serving.queue.stored_job import StoredJob

from .schema import ShownState, Video, VideoError

# milliseconds after which a client should ask again
SOONEST_POLL, LATEST_POLL, QUEUED_POLL = 200, 5000, 500


def video(stored: StoredJob, progress: JobProgress | None, keep_for: float | None, elsewhere: bool = False) -> Video:
    """Returns what a client sees of a job, also of one that runs on a server `elsewhere`, whose steps are not heard here."""
    job = stored.job
    outcome = stored.outcome or (progress.outcome if progress else None)
    shown = Video(
        id=job.id,
        model=job.model,
        status=_status(outcome, progress, elsewhere),
        progress=_progress(outcome["status"] if outcome else None, progress),
        created_at=int(job.created_at),
        seconds=seconds_of(job),
        size=size_of(job),
        prompt=job.prompt,
        remixed_from_video_id=job.remixed_from,
        num_frames=job.frames,
        fps=job.fps,
        seed=job.seed,
        synopsis=list(job.states),
        states=states_of(job),
        synopsis_source=job.synopsis_source,
        spread=job.mode,
        num_inference_steps=job.steps,
        guidance_scale=job.guidance,
        eta=job.eta,
        negative_prompt=job.negative,
        tar=job.tar,
        fast=list(job.fast),
        embeddings=job.embeddings,
        priority=job.priority,
        metadata=job.metadata,
    )
    if outcome is None:
        if progress is not None:
            shown.stage, shown.step, shown.seconds_left = progress.stage, progress.step, progress.seconds_left
        return shown
    shown.completed_at = int(outcome["at"])
    shown.expires_at = int(outcome["at"] + keep_for) if keep_for is not None else None
    if outcome["status"] == FAILED:
        shown.error = VideoError(code=outcome["code"], message=outcome["message"])
    else:
        shown.bytes, shown.sha256, shown.inference_seconds = outcome["bytes"], outcome["sha256"], outcome["seconds"]
    return shown


def _status(outcome: dict[str, Any] | None, progress: JobProgress | None, elsewhere: bool) -> Any:
    if outcome is not None:
        return outcome["status"]
    if elsewhere:
        return RUNNING
    return progress.status if progress else QUEUED


def _progress(ended: str | None, progress: JobProgress | None) -> int:
    if ended == COMPLETED:
        return 100
    return progress.percent if progress else 0


def states_of(job: Job) -> list[ShownState]:
    """Returns a job's states with their settings; one that shares the clip's negative prompt has none of its own."""
    said = zip_longest(job.states, job.at, job.durations, job.negatives)
    each = islice(said, len(job.states))
    return [ShownState(text=text, at=at, duration=duration, negative=negative) for text, at, duration, negative in each]


def seconds_of(job: Job) -> str:
    """Spells how long a job's video plays."""
    return f"{job.frames / job.fps:.3f}".rstrip("0").rstrip(".")


def size_of(job: Job) -> str:
    """Spells a job's size as WIDTHxHEIGHT."""
    height, width = job.size
    return f"{width}x{height}"


def poll_after(shown: Video) -> int:
    """Returns the milliseconds after which asking again is worth it."""
    if shown.seconds_left is None:
        return QUEUED_POLL if shown.status == "queued" else SOONEST_POLL
    return max(SOONEST_POLL, min(LATEST_POLL, int(shown.seconds_left * 100)))
