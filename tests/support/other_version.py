"""`vstar-engine` of another version, whose jobs have another field, and one of ours under another name."""

from vstar_engine.serving.jobs import job

job.VERSION = 2
to_json, from_json = job.Job.to_json, job.Job.from_json


def to_other(one):
    content = to_json(one)
    return {**content, "pace": 1.5, "video_steps": content.pop("steps")}


def from_other(content):
    plain = {name: value for name, value in content.items() if name not in ("pace", "video_steps")}
    assert content["pace"] == 1.5
    return from_json({**plain, "steps": content["video_steps"]})


job.Job.to_json, job.Job.from_json = to_other, staticmethod(from_other)


def load(settings):
    """Returns the slow engine, in a worker of this version."""
    from support import slow_engine

    return slow_engine.load(settings)


if __name__ == "__main__":
    from vstar_engine.commands.main import main

    raise SystemExit(main())
