"""Servers for tests: `vstar-engine serve` in a process of its own, with the slow engine, and the ledger that closes a run."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import httpx
import psutil

from vstar_engine.client import Client
from vstar_engine.errors import ServerError

HERE = Path(__file__).parent
# what a loaded machine may take to start two Python processes
START = 180
# jobs that a submitter has on their way at once: enough that every kill finds some, few enough that they end
OUTSTANDING = 8
SMALL = {"size": "64x32", "num_frames": 8, "num_inference_steps": 5, "enhance_prompt": False}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def error_of(answer, status, code=None, param=None):
    assert answer.status_code == status, (answer.status_code, answer.text)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert code is None or error["code"] == code, error
    assert param is None or error["param"] == param, error
    return error


class Server:
    """A server over a folder; it may be killed and started again, on the same port."""

    def __init__(self, folder, *options, keys=(), slow=None, prefix=(), model=False, module="vstar_engine"):
        self.folder, self.port, self.prefix, self.module = Path(folder), free_port(), list(prefix), module
        self.url = f"http://127.0.0.1:{self.port}"
        settings = {"folder": str(folder), **({"step": 0.01} if slow is None else slow)}
        renderer = () if model else ("--renderer", "support.slow_engine:load", "--renderer-settings", json.dumps(settings))
        self.options = [*renderer, "--min-free", "0", *options]
        self.keys, self.process, self.http = keys, None, httpx.Client(base_url=self.url, timeout=60.0)
        self.folder.mkdir(parents=True, exist_ok=True)

    def start(self, ready=True):
        """Starts it and returns the seconds until it was ready."""
        begun = time.monotonic()
        self.spawn()
        self.wait_for("/readyz" if ready else "/livez")
        return time.monotonic() - begun

    def spawn(self):
        """Starts it and waits for nothing."""
        words = [*self.prefix, sys.executable, "-m", self.module, "serve", "--model", "mini", "--port", str(self.port)]
        path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "VSTAR_API_KEYS": "\n".join(self.keys)}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*words, "--data", str(self.folder / "data"), *self.options], env=environment, stdout=log, stderr=log
            )

    def wait_for(self, path, status=200, within=START):
        end = time.monotonic() + within
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            if self.answers(path, status):
                return
            time.sleep(0.05)
        raise AssertionError(f"{path} did not answer {status}:\n{self.log()[-3000:]}")

    def answers(self, path="/livez", status=200):
        """Returns whether a path answers, and so."""
        try:
            return self.http.get(path).status_code == status
        except httpx.TransportError:
            return False

    def log(self):
        return (self.folder / "log").read_text(errors="replace")

    def kill(self):
        """Ends it as a power cut would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self, within=60.0):
        """Asks it to end and returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.http.close()
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def post(self, prompt="a tree", headers=None, **fields):
        return self.http.post("/v1/videos", json={"prompt": prompt, **SMALL, **fields}, headers=headers)

    def create(self, prompt="a tree", **fields):
        answer = self.post(prompt, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def get(self, id):
        answer = self.http.get(f"/v1/videos/{id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait(self, id, *statuses, within=30.0):
        """Waits until a video has one of the statuses, by default until it ended."""
        end = time.monotonic() + within
        while (video := self.get(id))["status"] not in (statuses or ("completed", "failed")):
            assert time.monotonic() < end, f"{video}\n{self.log()[-3000:]}"
            time.sleep(0.02)
        return video

    def every(self):
        """Lists every video, page by page, of each key where there are keys."""
        keys = [line.split()[-1] for line in self.keys if not line.startswith("metrics ")]
        return [video for key in keys or [None] for video in self.listed(key)]

    def listed(self, key=None):
        videos, after, headers = [], {}, {} if key is None else {"authorization": f"Bearer {key}"}
        while True:
            answer = self.http.get("/v1/videos", params={"limit": 100, **after}, headers=headers)
            assert answer.status_code == 200, answer.text
            page = answer.json()
            videos += page["data"]
            if not page["has_more"]:
                return videos
            after = {"after": page["last_id"]}

    def cancel_all(self):
        """Cancels whatever has not ended."""
        for key in [line.split()[-1] for line in self.keys] or [None]:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            for video in self.listed(key):
                if video["status"] in ("queued", "in_progress"):
                    assert self.http.post(f"/v1/videos/{video['id']}/cancel", headers=headers).status_code == 200

    @property
    def videos(self):
        """The folder of results, also where the server has a file system of its own there."""
        given = dict(zip(self.options, self.options[1:], strict=False)).get("--videos", self.folder / "data" / "videos")
        folder = Path(given).absolute()
        return Path(f"/proc/{self.process.pid}/root{folder}") if self.prefix else folder

    def kill_all(self):
        """Ends it with every process under it, for a tracer's death leaves what it traced."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            child.kill()
        self.kill()

    def ledger(self, accepted=None, within=60.0, more=False, swept=False):
        """Checks that what was accepted is what ended, once each, and that every file is what its record says.

        `more`: there may be jobs whose acceptance could not be told; `swept`: some were deleted by age or quota, or on request.
        None: others sent the jobs, so that only what is listed is known.
        """
        end = time.monotonic() + within
        while left := [video for video in self.every() if video["status"] not in ("completed", "failed")]:
            assert time.monotonic() < end, f"{left}\n{self.log()[-3000:]}"
            time.sleep(0.1)
        videos = self.every()
        ids = [video["id"] for video in videos]
        assert len(ids) == len(set(ids))
        if accepted is not None:
            assert more or set(ids) <= set(accepted)
            assert swept or set(ids) >= set(accepted)
        done = [video for video in videos if video["status"] == "completed"]
        wanted = {f"{video['id']}{end}" for video in done for end in (".mp4", ".jpg", ".sheet.jpg")}
        # a job that was cancelled while it was written loses its files when that is over
        while (names := {path.name for path in self.videos.iterdir()}) != wanted:
            assert time.monotonic() < end, (names ^ wanted, [video for video in videos if video not in done])
            time.sleep(0.1)
        for video in done:
            path = self.videos / f"{video['id']}.mp4"
            content = path.read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (video["bytes"], video["sha256"])
            with av.open(str(path)) as container:
                assert sum(1 for _ in container.decode(video=0)) == video["num_frames"]
        return videos


class Submitter:
    """Clients that go on submitting while their server dies again and again; what a reply accepted is in `ids`."""

    def __init__(self, server, clients=2):
        self.server, self.ids, self.errors, self.stopping = server, [], [], threading.Event()
        self.pool = ThreadPoolExecutor(clients)
        self.done = [self.pool.submit(self.run, number) for number in range(clients)]

    def run(self, number):
        with Client(self.server.url, patience=START, timeout=10) as client:
            fields = {name: value for name, value in SMALL.items() if name != "prompt"}
            while not self.stopping.is_set():
                try:
                    if sum(not video.ended for video in client.list(OUTSTANDING)) < OUTSTANDING:
                        self.ids.append(client.submit("a tree", **fields).id)
                except ServerError as error:
                    self.errors.append(error)
                time.sleep(0.02)

    def stop(self):
        self.stopping.set()
        for future in self.done:
            future.result()
        self.pool.shutdown()
