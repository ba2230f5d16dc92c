"""A checkpoint continues a video to the very bytes that an undisturbed run has."""

import json
import logging
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vstar_engine.commands.main import main
from vstar_engine.config.request import Request
from vstar_engine.config.sampling import STEP_CACHE, Sampling
from vstar_engine.sampling.saved_state import Checkpoint, read

ASKED = Request(("snow", "a house"), 12, 5, (32, 32), Sampling(4), window=8, overlap=3)
CLIP = ["--frames=12", "--size=32x32", "--window=8", "--overlap=3"]
WORDS = ["generate", "--model=mini", "--states", "snow", "house", *CLIP, "--steps"]


class Stopped(Exception):
    """Ends a run between two steps."""


@pytest.fixture
def engine(mini):
    return mini


@pytest.fixture(scope="module")
def whole(mini):
    return mini.run(ASKED)


@pytest.fixture
def interrupted(engine, tmp_path):
    """The checkpoint of a run that was stopped after 3 of 4 steps, written after 2."""

    def stop(done, total):
        if done == 3:
            raise Stopped

    checkpoint = Checkpoint(tmp_path / "v.mp4.checkpoint", every=2)
    with pytest.raises(Stopped):
        engine.run(ASKED, stop, checkpoint=checkpoint)
    return replace(checkpoint, resume=True)


def test_a_resumed_video_has_the_bytes_of_an_undisturbed_one(engine, interrupted, whole):
    steps = []
    video = engine.run(ASKED, lambda done, total: steps.append(done), checkpoint=interrupted)
    np.testing.assert_array_equal(video.frames, whole.frames)
    assert (steps, video.provenance) == ([3, 4], whole.provenance)
    assert read(interrupted.path).done == 4


def test_a_checkpoint_of_another_request_or_code_is_refused(engine, interrupted):
    with pytest.raises(ValueError, match=r"another request \(seed\); give the same options, or leave out --resume"):
        engine.run(replace(ASKED, seed=6), checkpoint=interrupted)
    tensors = load_file(interrupted.path)
    with safe_open(interrupted.path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    about["made_of"]["code"] = "other"
    save_file(tensors, interrupted.path, {"kind": "vstar-engine checkpoint of a video", "about": json.dumps(about)})
    with pytest.raises(ValueError, match="made with another code"):
        engine.run(ASKED, checkpoint=interrupted)


def test_another_kind_of_machine_is_said_and_goes_on(engine, interrupted, whole, caplog):
    tensors = load_file(interrupted.path)
    with safe_open(interrupted.path, "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["about"])
    about["machine"]["device"] = "another"
    save_file(tensors, interrupted.path, {**metadata, "about": json.dumps(about)})
    with caplog.at_level(logging.WARNING):
        video = engine.run(ASKED, checkpoint=interrupted)
    assert "equal to rounding, not to the bit" in caplog.text
    np.testing.assert_array_equal(video.frames, whole.frames)


def test_what_cannot_be_resumed_from(engine, interrupted, tmp_path):
    kept = interrupted.path.read_bytes()
    interrupted.path.write_bytes(kept[:-9])
    with pytest.raises(ValueError, match="is not a whole checkpoint and is kept"):
        interrupted.check()
    assert interrupted.path.read_bytes() == kept[:-9]
    save_file({}, interrupted.path, {"kind": "another"})
    with pytest.raises(ValueError, match="is no checkpoint of a video"):
        interrupted.check()
    with pytest.raises(ValueError, match="there is no checkpoint"):
        Checkpoint(tmp_path / "nothing", resume=True).check()
    with pytest.raises(ValueError, match="every 1 or more steps, got 0"):
        Checkpoint(tmp_path / "nothing", 0)
    cached = replace(ASKED, window=None, sampling=Sampling(4, fast=(STEP_CACHE,)))
    with pytest.raises(ValueError, match="does not compose with checkpoints"):
        engine.run(cached, checkpoint=Checkpoint(tmp_path / "nothing"))


def test_the_command_says_what_is_wrong_before_it_loads_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for more, said in [
        (["--resume"], "there is no checkpoint"),
        (["--resume", "--checkpoint-every", "0"], "leave one of them out"),
    ]:
        assert main([*WORDS, "2", *more]) == 2
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.reliability
def test_a_killed_command_resumes_to_the_same_file(tmp_path):
    command = [sys.executable, "-m", "vstar_engine", *WORDS, "12", "--checkpoint-every", "1"]
    subprocess.run([*command, "--out", "whole.mp4"], cwd=tmp_path, check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.mp4"]
    out, checkpoint = tmp_path / "killed.mp4", tmp_path / "killed.mp4.checkpoint"
    for more in ([], ["--resume"]):  # killed twice
        seen = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = subprocess.Popen(
            [*command, "--out", out.name, *more], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > seen):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert checkpoint.exists()
        assert not out.exists()
    subprocess.run([*command, "--out", out.name, "--resume"], cwd=tmp_path, check=True, capture_output=True)
    assert out.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert not checkpoint.exists()
