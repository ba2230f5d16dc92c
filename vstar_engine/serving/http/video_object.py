"""The video object of the API: a stored job and its progress."""

from itertools import islice, zip_longest
from typing import Any

from vstar_engine.config.video_fields import STATE, fields_at
from vstar_engine.serving.jobs.job import Job
from vstar_engine.serving.jobs.progress import COMPLETED, FAILED, QUEUED, RUNNING, JobProgress
from vstar_engine.serving.queue.stored_job import StoredJob

from .schema import ShownState, VideoError, VideoObject

# milliseconds after which a client should ask again
SOONEST_POLL, LATEST_POLL, QUEUED_POLL = 200, 5000, 500


def video(stored: StoredJob, progress: JobProgress | None, keep_for: float | None, elsewhere: bool = False) -> VideoObject:
    """Returns the video object of a job; `elsewhere` jobs run on another server, whose progress is unknown here."""
    job = stored.job
    outcome = stored.outcome or (progress.outcome if progress else None)
    shown = VideoObject(
        id=job.id,
        model=job.model,
        status=_status(outcome, progress, elsewhere),
        progress=_progress(outcome["status"] if outcome else None, progress),
        created_at=int(job.created_at),
        seconds=seconds_of(job),
        prompt=job.prompt,
        remixed_from_video_id=job.remixed_from,
        synopsis=list(job.states),
        states=states_of(job),
        synopsis_source=job.synopsis_source,
        tar=job.tar,
        embeddings=job.embeddings,
        priority=job.priority,
        metadata=job.metadata,
        **job.shown(),
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
    """Returns a job's states with their settings; `negative` is null for states that share the video's."""
    names = [row.http_name for row in fields_at(STATE)]
    each = islice(zip_longest(*(getattr(job, row.name) for row in fields_at(STATE))), len(job.states))
    return [ShownState(**dict(zip(names, values, strict=True))) for values in each]


def seconds_of(job: Job) -> str:
    """Returns the length of a job's video in seconds, as text."""
    return f"{job.frames / job.fps:.3f}".rstrip("0").rstrip(".")


def poll_after(shown: VideoObject) -> int:
    """Returns after how many milliseconds a client should ask again."""
    if shown.seconds_left is None:
        return QUEUED_POLL if shown.status == "queued" else SOONEST_POLL
    return max(SOONEST_POLL, min(LATEST_POLL, int(shown.seconds_left * 100)))
