"""What users already have outlives every move: a video, a database of jobs and an engine of earlier versions are read."""

import json
import shlex
import shutil
import sqlite3
from dataclasses import fields
from pathlib import Path

import av
import numpy as np
import pytest

from vstar_engine import Engine
from vstar_engine.artifacts.manifest import write_manifest
from vstar_engine.commands.main import main
from vstar_engine.config.request import Request
from vstar_engine.errors import EngineError
from vstar_engine.video import read_provenance

RECORDED = Path(__file__).parent / "recorded"
COMMAND = (
    "vstar-engine generate --model mini --device cpu --dtype float32 '--states=a red ball on the left' "
    "'--states=a red ball on the right' --negative= --mode=linear --frames=8 --size=32x64 --seed=7 --steps=1 --guidance=12.0 "
    "--eta=1.0 --fps-condition=28 --tar=none --sigma=0=1.0 --sigma=1=8.0 --strength=1.0 --until=0 --fps=8.0"
)
REBUILD = "vstar-engine build --backend inductor --model mini --frames 4 --size 32x64 --batch 2 --dtype float32 --device cpu"
# mean difference of two files' bytes: machines round differently, and another seed or state is off by 20 and more
SAME_VIDEO = 2.0
# how a server shows jobs that the database says ended
ENDED = {"SUCCESS": "completed", "CANCELLED": "failed"}


def frames_of(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)


def test_inspect_prints_the_command_that_makes_a_recorded_video_again(tmp_path, capsys):
    assert main(["inspect", str(RECORDED / "video.mp4")]) == 0
    *_, printed = capsys.readouterr().out.splitlines()
    assert printed == COMMAND
    made = tmp_path / "made.mp4"
    assert main([*shlex.split(printed)[1:], "--out", str(made)]) == 0
    assert np.abs(frames_of(made) - frames_of(RECORDED / "video.mp4")).mean() < SAME_VIDEO
    recorded, again = read_provenance(RECORDED / "video.mp4"), read_provenance(made)
    assert again["model"] == recorded["model"]
    # what is younger than the file has its default
    sampling = {"sampler": "ddim", "spacing": "leading"} | recorded["request"]["sampling"]
    windows = {"window", "overlap", "blend", "phase", "noise", "noise_share", "guide"}
    younger = {field.name: field.default for field in fields(Request) if field.name in windows}
    assert again["request"] == younger | recorded["request"] | {"sampling": sampling}


def half_ended(database):
    """Leaves the second finished job as a kill does between the two writes of an end: its step is recorded, the job is not."""
    (id,) = database.execute("SELECT max(rowid), workflow_uuid FROM operation_outputs").fetchone()[1:]
    database.execute("UPDATE workflow_status SET status = 'PENDING', completed_at = NULL WHERE workflow_uuid = ?", (id,))
    database.execute("DELETE FROM workflow_output WHERE workflow_uuid = ?", (id,))


def test_a_server_takes_up_recorded_jobs(tmp_path):
    import support.serve_packages  # noqa: F401 - skips where they are missing
    from support.servers import Server

    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    shutil.copytree(RECORDED / "serve" / "videos", data / "videos")
    with sqlite3.connect(data / "jobs.sqlite") as database:
        database.executescript((RECORDED / "serve" / "jobs.sql").read_text())
        half_ended(database)
        begun = dict(database.execute("SELECT workflow_uuid, status FROM workflow_status"))
    database.close()
    assert sorted(begun.values()) == ["CANCELLED", "ENQUEUED", "PENDING", "PENDING", "PENDING", "PENDING", "SUCCESS"]
    with Server(tmp_path, "--warm", "4x32x64", "--max-batch", "1", model=True) as server:
        ended = {video["id"]: video["status"] for video in server.every() if begun[video["id"]] in ENDED}
        assert ended == {id: ENDED[status] for id, status in begun.items() if status in ENDED}
        videos = server.ledger(list(begun))
        assert {video["id"]: video["status"] for video in videos} == {
            id: ENDED.get(status, "completed") for id, status in begun.items()
        }
        # a job is what was asked for, not something else of that id
        asked = {video["prompt"]: video for video in videos}
        assert (asked["running"]["num_inference_steps"], asked["running"]["seed"]) == (25, 2)
        assert [state["text"] for state in asked["waiting"]["states"]] == ["a red ball on the left", "a red ball on the right"]
        assert asked["waiting"]["metadata"] == {"take": "one"}
        assert asked["cancelled"]["error"]["code"] == "cancelled"


@pytest.fixture
def engine(tmp_path):
    folder = tmp_path / "engine"
    folder.mkdir(mode=0o700)
    shutil.copy(RECORDED / "engine" / "manifest.json", folder)
    return folder


def test_a_recorded_manifest_is_read(engine):
    """Its own sha256 and its list of files hold: what is missing is the package alone."""
    with pytest.raises(EngineError, match=r"unet.pt2 is missing, though manifest.json lists it"):
        Engine.load(engine=engine)


def test_a_recorded_engine_is_refused_as_stale_with_the_command_that_rebuilds(engine, capsys):
    manifest = json.loads((engine / "manifest.json").read_text())
    (engine / "manifest.json").unlink()
    (engine / "unet.pt2").write_bytes(bytes(range(256)))
    write_manifest(engine, {name: value for name, value in manifest.items() if name not in ("files", "sha256")})
    assert main(["generate", "a tree", "--no-synopsis", "--frames", "4", "--engine", str(engine)]) == 9
    said = capsys.readouterr().err
    assert f"was built for sources {manifest['identity']['sources'][:12]}, not" in said
    assert f"rebuild it: {REBUILD} --out {engine} --force\n" in said
