"""A job as read from the database, also one that another version of the server wrote."""

import functools
from dataclasses import dataclass
from typing import Any, get_type_hints

from dbos import WorkflowStatus
from pydantic import TypeAdapter, ValidationError

from vstar_engine.serving.jobs.events import CANCELLED, GENERATION_FAILED, WORKER_CRASHED
from vstar_engine.serving.jobs.job import VERSION, Job
from vstar_engine.serving.jobs.progress import FAILED, failed

# jobs of another version of `Job` are left to a server of that version
OURS = f"jobs-{VERSION}"
# a job that was running at this many crashes of the server is taken for their cause. The limit is high, since a server may be
# killed on purpose; crashes of a worker are counted by the dispatcher
MOST_RECOVERIES = 100
UNFINISHED, FINISHED = ["ENQUEUED", "DELAYED", "PENDING"], ["SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"]


def application_version(model: str) -> str:
    """Returns the label of the jobs that a server runs: those of its model and of its version of `Job`."""
    return f"{OURS}/{model}"


@dataclass(frozen=True)
class StoredJob:
    """A job in the store.

    created: when the database stored it, in milliseconds.
    outcome: None until the job ended.
    ours: false for a job of another version of `Job`; `job` then holds the fields in common and can only be shown.
    new: made by the current request.
    taken_by: the instance of the server that runs it.
    """

    job: Job
    created: int
    outcome: dict[str, Any] | None = None
    ours: bool = True
    new: bool = False
    taken_by: str | None = None


def stored_job_from(status: WorkflowStatus) -> StoredJob:
    """Reads a job of any version; TypeError for unknown fields in a job of this version."""
    assert status.input is not None
    content, ours = status.input["args"][0], (status.app_version or "").partition("/")[0] == OURS
    job = Job.from_json(content) if ours else _in_common(status, content)
    taken_by = status.executor_id if status.status == "PENDING" else None
    return StoredJob(job, status.created_at or 0, outcome_of(status), ours, taken_by=taken_by)


def _in_common(status: WorkflowStatus, content: dict[str, Any]) -> Job:
    """Reads a job of another version: the fields whose names and types are the same as ours."""
    whose = {"id": status.workflow_id, "key_id": status.authenticated_user or ""}
    found: dict[str, Any] = {}
    for name, kind in _field_types().items():
        try:
            found[name] = kind.validate_python(content[name])
        except (KeyError, ValidationError):
            continue
    unknown = {
        "model": "",
        "prompt": "",
        "states": (),
        "frames": 0,
        "size": (0, 0),
        "created_at": (status.created_at or 0) / 1000,
    }
    return Job(**{**unknown, **found, **whose})


@functools.cache
def _field_types() -> dict[str, TypeAdapter[Any]]:
    return {name: TypeAdapter(kind) for name, kind in get_type_hints(Job).items()}


def end_of(status: WorkflowStatus) -> float:
    """Returns the time at which a job ended."""
    outcome = outcome_of(status)
    assert outcome is not None
    return outcome["at"]


def outcome_of(status: WorkflowStatus) -> dict[str, Any] | None:
    """Returns a job's outcome in the form of `progress.completed` and `progress.failed`; None before its end."""
    if status.status in UNFINISHED:
        return None
    if status.status == "SUCCESS":
        return status.output
    at = (status.completed_at or status.updated_at or 0) / 1000
    code, message = {
        "CANCELLED": (CANCELLED, "cancelled on request"),
        "MAX_RECOVERY_ATTEMPTS_EXCEEDED": (WORKER_CRASHED, f"the server crashed {MOST_RECOVERIES} times while this job ran"),
    }.get(status.status, (GENERATION_FAILED, "the job ended with an error; see the server's log"))
    return {**failed(code, message), "status": FAILED, "at": at}
