"""The worker as a process: it goes when its parent goes, and leaves nothing half-written behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from support import slow_engine
from support.slow_engine import job
from vstar_engine.errors import OutputError
from vstar_engine.serving.jobs import events, result_files
from vstar_engine.serving.workers import worker
from vstar_engine.video import Video

OWNER = "an-owner"
# a parent that starts an engine, says the worker's process id, and sleeps
PARENT = """
import asyncio, sys
from support import slow_engine

async def main():
    engine = slow_engine.client(sys.argv[1])
    await engine.start()
    print(engine.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def alive(pid):
    """Returns whether a process runs; one that ended and was not waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stopped", [False, True])
def test_a_worker_does_not_outlive_its_parent(tmp_path, stopped):
    environment = {**os.environ, **slow_engine.environment()}
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, env=environment) as parent:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        parent.kill()
    end = time.monotonic() + 10
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(pid)


class Child:
    """A worker process at the other end of a socket; what it complains of is in `complaints`."""

    def __init__(self, folder, ready=True, **settings):
        self.ours, theirs = socket.socketpair()
        self.complaints = folder / "complaints"
        with theirs, self.complaints.open("wb") as log:
            command = [sys.executable, "-m", "vstar_engine.serving.workers.worker", str(theirs.fileno())]
            environment = {**os.environ, **slow_engine.environment()}
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stderr=log)
        self.ours.settimeout(60)
        self.lines = self.ours.makefile("rb")
        about = {"factory": slow_engine.FACTORY, "settings": {"step": 0.0, **settings}, "folder": str(folder), "owner": OWNER}
        self.start = {"do": "start", **about, "buckets": [], "max_batch": 2, "known": {}, "fast": [], "log": 30}
        if ready:
            self.say(self.start)
            assert self.receive()["say"] == "ready"

    def say(self, message):
        self.ours.sendall(json.dumps(message).encode() + b"\n")

    def receive(self):
        return json.loads(self.lines.readline())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.ours.close()
        self.lines.close()
        self.process.wait(60)
        assert self.complaints.read_text() == ""


def test_it_ends_when_the_socket_is_closed_even_in_the_middle_of_a_step(tmp_path):
    with Child(tmp_path) as child:
        child.say({"do": "run", "run": 1, "jobs": [job("step=30").to_json()]})
        assert child.receive()["event"]["kind"] == "started"
        start = time.monotonic()
    assert time.monotonic() - start < 5.0
    assert child.process.returncode == 0


@pytest.mark.parametrize("said", ["nothing", "half a line", "all, to one that loads for long"])
def test_it_ends_when_the_socket_is_closed_before_it_is_ready(tmp_path, said):
    """As where a server is killed while it starts; what would wait for the end of loading would wait for an hour."""
    with Child(tmp_path, ready=False, load=3600) as child:
        line = json.dumps(child.start).encode() + b"\n"
        child.ours.sendall({"n": b"", "h": line[:40], "a": line}[said[0]])
        time.sleep(0.5)
    assert child.process.returncode == 0


def test_it_ends_when_nobody_reads_what_it_says_any_more(tmp_path):
    """Closed with much unread, and while it writes: its next line meets a broken pipe or a connection that was reset."""
    with Child(tmp_path) as child:
        for number in range(200):
            child.say({"do": "run", "run": number, "jobs": [job(steps=50).to_json()]})
        child.receive()
    assert child.process.returncode == 0


def test_it_does_not_mind_the_signals_that_end_its_server(tmp_path):
    with Child(tmp_path) as child:
        child.process.send_signal(signal.SIGINT)
        child.process.send_signal(signal.SIGTERM)
        child.say({"do": "run", "run": 1, "jobs": [job().to_json()]})
        while (message := child.receive())["say"] != "event" or message["event"]["kind"] != "done":
            pass


@pytest.mark.parametrize("delay", [i / 100 for i in range(8)])
def test_no_moment_of_being_killed_leaves_a_partial_result(tmp_path, delay):
    """Killed at some moment of writing its results: what has a final name is whole."""
    one = job(frames=64, size=(128, 256), steps=1)
    with Child(tmp_path) as child:
        child.say({"do": "run", "run": 1, "jobs": [one.to_json()]})
        while (message := child.receive())["say"] != "event" or message["event"].get("name") != "encode":
            pass
        time.sleep(delay)
        child.process.kill()
    for path in tmp_path.glob("video_*"):
        whole(path)
    result_files.sweep(tmp_path, OWNER)
    assert not list(tmp_path.glob(".*"))


def whole(path):
    import av
    from PIL import Image

    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 64
    else:
        with Image.open(path) as image:
            image.load()


def video(frames=9):
    return Video(
        np.random.default_rng(0).integers(0, 255, (frames, 32, 64, 3), dtype=np.uint8), 8.0, {"engine": "vstar-engine"}
    )


def test_results_are_a_video_its_thumbnail_and_a_sheet(tmp_path):
    from PIL import Image

    about = result_files.write(video(), tmp_path, "video_1", OWNER)
    assert (about["frames"], about["width"], about["height"]) == (9, 64, 32)
    assert Image.open(tmp_path / "video_1.jpg").size == (64, 32)
    assert Image.open(tmp_path / "video_1.sheet.jpg").size == (132, 32)
    result_files.remove(tmp_path, "video_1")
    assert not list(tmp_path.iterdir())


def test_a_file_that_came_out_short_is_not_taken(tmp_path, monkeypatch):
    """As where a disk is full when the muxer closes its file, which it does without a word."""
    whole_save = Video.save

    def cut(self, path):
        return whole_save(Video(self.frames[:-1], self.fps, self.provenance), path)

    monkeypatch.setattr(Video, "save", cut)
    with pytest.raises(OutputError, match="8 of 9 frames"):
        result_files.write(video(), tmp_path, "video_1", OWNER)
    assert not (tmp_path / "video_1.mp4").exists()


def test_a_worker_refuses_what_it_does_not_know(tmp_path):
    said = []
    with pytest.raises(ValueError, match="'dance'"):
        worker.Worker(slow_engine.Slow(0.0), tmp_path, OWNER, said.append).handle({"do": "dance"})


def test_an_error_that_breaks_the_device_is_not_caught(tmp_path):
    said = []
    one = worker.Worker(slow_engine.Slow(0.0), tmp_path, OWNER, said.append)

    def work():
        raise RuntimeError("fatal")

    with pytest.raises(RuntimeError, match="fatal"):
        one.guarded(1, [job()], work)
    assert not said


def test_the_older_run_takes_a_step_after_each_newer_one(tmp_path):
    said = []
    one = worker.Worker(slow_engine.Slow(0.0), tmp_path, OWNER, said.append)
    one.begin(1, [job("long", steps=9)])
    for number in (2, 3):
        one.begin(number, [job("short", steps=2)])
        one.step_newest()
        one.step_newest()
    assert [run.batch.done for run in one.runs] == [2]
    one.writer.shutdown()
    done = [message for message in said if message["say"] == "event" and message["event"]["kind"] == events.Done.kind]
    assert len(done) == 2
