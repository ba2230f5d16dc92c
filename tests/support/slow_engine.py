"""A controllable engine for the server's tests: steps of a given time, and faults by words in the prompt.

It runs in the same worker, over the same socket, as the real one; it knows nothing of PyTorch, so it starts at once. A prompt
may hold, anywhere:

    crash@K     the process ends with code 1 at step K (from 0), on every try
    segv@K      it ends by a segmentation fault
    kill-once@K it kills itself at step K, once: FOLDER remembers
    hang@K      step K never ends
    stop@K      the process stops itself (SIGSTOP) at step K
    memory@K    step K raises MemoryError; memory-batch@K only in company
    rlimit@K    step K takes memory until the system gives no more of it (RLIMIT_AS)
    error@K     step K raises RuntimeError
    invalid     the job is refused
    step=S      each step takes S seconds for this video
    finish=S    decoding it takes S seconds, in PARTS parts
"""

import asyncio
import errno
import itertools
import os
import re
import resource
import signal
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from vstar_engine.serving.jobs.job import Job, new_id
from vstar_engine.serving.workers.dispatch_state import BatchingPolicy
from vstar_engine.serving.workers.local_process import ProcessEngine
from vstar_engine.video import Video

HERE = Path(__file__).parent
FACTORY = "support.slow_engine:load"
SIZE = (32, 64)
BUCKET = (8, *SIZE)
# runs of frames in which a video is decoded
PARTS = 4
# no test may take longer, in seconds: a job that is lost would wait for ever
LIMIT = 60.0


def job(prompt="a tree", *, frames=8, size=SIZE, steps=5, **fields):
    """Makes a job for it."""
    about = {"id": new_id(), "key_id": "", "model": "slow", "created_at": time.time(), **fields}
    return Job(prompt=prompt, states=(prompt,), frames=frames, size=size, steps=steps, **about)


def policy(**changed):
    return BatchingPolicy(**{"buckets": (BUCKET,), "hang_after": 2.0, **changed})


PLAIN = policy()


def client(folder, *, step=0.01, policy=PLAIN, **settings):
    """An `EngineClient` that runs it in a child process; results go to `folder`."""
    return ProcessEngine(Path(folder), {"step": step, **settings}, policy, FACTORY, environment())


@asynccontextmanager
async def running(folder, **settings):
    """An engine that has started; time is up after LIMIT."""
    async with asyncio.timeout(LIMIT):
        engine = client(folder, **settings)
        await engine.start()
        try:
            yield engine
        finally:
            await engine.close(0)


def environment():
    """What a child needs to find this module."""
    return {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}


@dataclass
class Row:
    index: int
    job: Job


@dataclass
class Batch:
    rows: list
    steps: int
    done: int = 0
    seconds: dict = field(default_factory=lambda: {"text": 0.0, "denoise": 0.0})

    def drop(self, index):
        self.rows = [row for row in self.rows if row.index != index]


class Slow:
    """The renderer: `step` seconds a step, `wider` more of that for each further video in a batch.

    `load`, `begin` and `finish` are seconds too; `folder` is where kill-once leaves its mark. The syncs whose numbers are in
    `full` find no room on the disk: there are six for a video, those of warming up first.
    """

    def __init__(self, step, wider=0.2, finish=0.0, begin=0.0, folder=None, load=0.0, full=()):
        time.sleep(load)
        sync, count = os.fsync, itertools.count()

        def sync_or_not(descriptor):
            if next(count) in full:
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(descriptor)

        os.fsync = sync_or_not
        self.seconds, self.wider, self.ending, self.beginning = step, wider, finish, begin
        self.folder = folder

    def facts(self):
        named = {"model": "slow", "weights": "none", "backend": "slow", "device": "none", "dtype": "none"}
        return {**named, "size": list(SIZE), "multiple": 32, "levels": 3, "max_frames": 512, "text": True}

    def buckets(self):
        return [BUCKET]

    def most_at_once(self):
        return 64

    def counters(self):
        return {"cache_hits": 0, "cache_misses": 0, "cache_bytes": 0}

    def begin(self, jobs):
        time.sleep(self.beginning)
        if any("invalid" in job.prompt for job in jobs):
            raise ValueError("the prompt is invalid")
        return Batch([Row(i, job) for i, job in enumerate(jobs)], jobs[0].steps)

    def step(self, batch):
        start = time.perf_counter()
        for row in batch.rows:
            self.fault(row.job.prompt, batch)
        given = [float(found[1]) for row in batch.rows if (found := re.search(r"step=([\d.]+)", row.job.prompt))]
        time.sleep(max(given, default=self.seconds) * (1 + self.wider * (len(batch.rows) - 1)))
        batch.done += 1
        batch.seconds["denoise"] += time.perf_counter() - start

    def fault(self, prompt, batch):
        for kind, at in re.findall(r"([a-z-]+)@(\d+)", prompt):
            if int(at) != batch.done:
                continue
            if kind == "memory" or (kind == "memory-batch" and len(batch.rows) > 1):
                raise MemoryError
            if kind == "rlimit":
                take_memory()
            if kind == "error":
                raise RuntimeError("something went wrong")
            if kind == "kill-once" and not Path(self.folder, "killed").exists():
                Path(self.folder, "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            {"crash": lambda: os._exit(1), "hang": lambda: time.sleep(3600)}.get(kind, int)()
            if kind in ("segv", "stop"):
                os.kill(os.getpid(), {"segv": signal.SIGSEGV, "stop": signal.SIGSTOP}[kind])

    def finish(self, batch, row, on_frames=None):
        job = row.job
        given = re.search(r"finish=([\d.]+)", job.prompt)
        for _ in range(PARTS):
            time.sleep((float(given[1]) if given else self.ending) / PARTS)
            if on_frames:
                on_frames(None)
        height, width = job.size
        frames = np.full((job.frames, height, width, 3), job.seed % 200, np.uint8)
        frames[np.arange(job.frames), :, np.arange(job.frames) % width] = 255
        made = {"engine": "vstar-engine", "model": "slow", "request": {"states": job.states, "seed": job.seed}}
        return Video(frames, job.fps, made, {**batch.seconds, "decode": self.ending})

    def preview(self, row):
        return np.full((4, 32, 3), row.job.seed % 256, np.uint8)

    def learn_colours(self, row, video):
        assert len(video.frames) == row.job.frames

    def is_shortage(self, error):
        return isinstance(error, MemoryError)

    def is_fatal(self, error):
        return "fatal" in str(error)

    def release(self):
        pass


def take_memory():
    """Lets the system refuse memory, 256 MiB on from here."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**28, before[1]))
    held = []
    try:
        while True:
            held.append(np.ones(2**22))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def load(settings):
    return Slow(**settings)


async def events_of(engine, job, timed=None):
    """Runs a job to its end and returns its events."""
    timed = [] if timed is None else timed
    async for event in engine.submit(job):
        timed.append((time.monotonic(), event))
    return [event for _, event in timed]


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def of(kind, found):
    return [event for event in found if isinstance(event, kind)]
