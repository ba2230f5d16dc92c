"""A job as the database tells of it, also one that a server of another version wrote there."""

import functools
from dataclasses import dataclass
from typing import Any, get_type_hints

from dbos import WorkflowStatus
from pydantic import TypeAdapter, ValidationError

from vstar_engine.serving.jobs.events import CANCELLED, GENERATION_FAILED, WORKER_CRASHED
from vstar_engine.serving.jobs.job import VERSION, Job
from vstar_engine.serving.jobs.progress import FAILED, failed

# jobs of another version of `Job` are left to a server that understands them
OURS = f"jobs-{VERSION}"
# a job that sees this many deaths of the server is taken for their cause. The engine counts the deaths of its worker by itself;
# a server that is killed at will must not lose the jobs that happened to run
MOST_RECOVERIES = 100
UNFINISHED, FINISHED = ["ENQUEUED", "DELAYED", "PENDING"], ["SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"]


def application_version(model: str) -> str:
    """Names what a server takes from the database: jobs of its model and version. The others wait for a server of theirs."""
    return f"{OURS}/{model}"


@dataclass(frozen=True)
class StoredJob:
    """A job as the store knows it; `outcome` is None until it ended. `created` is when the database got it, in milliseconds.

    One that is not `ours` came from a server with other fields of jobs: `job` is what they say in common, to be shown alone.
    One that is `new` was made by the very request that asks for it. `taken_by` is the instance of the server that took it up.
    """

    job: Job
    created: int
    outcome: dict[str, Any] | None = None
    ours: bool = True
    new: bool = False
    taken_by: str | None = None


def stored_job_from(status: WorkflowStatus) -> StoredJob:
    """Reads a job of any version; TypeError where one of this version has other fields."""
    assert status.input is not None
    content, ours = status.input["args"][0], (status.app_version or "").partition("/")[0] == OURS
    job = Job.from_json(content) if ours else _in_common(status, content)
    taken_by = status.executor_id if status.status == "PENDING" else None
    return StoredJob(job, status.created_at or 0, outcome_of(status), ours, taken_by=taken_by)


def _in_common(status: WorkflowStatus, content: dict[str, Any]) -> Job:
    """Reads another version's job, as far as its fields have the names and types of ours."""
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
    """Returns when a job ended, as was told."""
    outcome = outcome_of(status)
    assert outcome is not None
    return outcome["at"]


def outcome_of(status: WorkflowStatus) -> dict[str, Any] | None:
    """Returns how a job ended, as `progress.completed` and `progress.failed` put it; None before."""
    if status.status in UNFINISHED:
        return None
    if status.status == "SUCCESS":
        return status.output
    at = (status.completed_at or status.updated_at or 0) / 1000
    code, message = {
        "CANCELLED": (CANCELLED, "cancelled on request"),
        "MAX_RECOVERY_ATTEMPTS_EXCEEDED": (WORKER_CRASHED, f"the server died {MOST_RECOVERIES} times while this job ran"),
    }.get(status.status, (GENERATION_FAILED, "the job ended in an error; the server's log has more"))
    return {**failed(code, message), "status": FAILED, "at": at}
