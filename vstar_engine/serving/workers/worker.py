"""The worker process: receives jobs and sends events as JSON lines over a socket from its parent.

    python -m vstar_engine.serving.workers.worker DESCRIPTOR

To it: {"do": "start", ...} once, then {"do": "run", "run": number, "jobs": [...]}, {"do": "cancel", "id": ...}.
From it: {"say": "ready", "facts": ...} or {"say": "refused", "message": ...}; {"say": "event", "id": ..., "event": ...};
{"say": "free", "run": number, ...} when all videos of a run have left the device; and {"say": "failed", "ids": ...,
"code": ..., "message": ...} for jobs that failed together: the parent decides whether to retry each alone.

The process exits with code 0 as soon as the socket is closed.
"""

import base64
import contextlib
import ctypes
import gc
import io
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from vstar_engine.errors import VstarError
from vstar_engine.serving.jobs import events, result_files
from vstar_engine.serving.jobs.job import Job
from vstar_engine.serving.telemetry.json_log import configure, formatter
from vstar_engine.video import Video

from .renderer import Batch, Renderer
from .warmup import bucket_name, warm

log = logging.getLogger(__name__)

PREVIEW_EVERY = 0.5  # seconds
PREVIEW_QUALITY = 70
# videos that may wait to be written while others are made
WRITING = 4
# seconds between two checks for cancellations while the writer is full
GLANCE = 0.05
PR_SET_PDEATHSIG = 1

Message = dict[str, Any]
Send = Callable[[Message], None]


class JobCancelled(Exception):
    """Stops the decoding of a video whose job was cancelled."""


@dataclass
class Run:
    """A batch in the worker: its jobs by index, and when its preview and its progress within a step were last sent."""

    number: int
    jobs: list[Job]
    batch: Batch
    shown: float = 0.0
    told: float = 0.0

    def index(self, id: str) -> int | None:
        """Returns the index of a job that is still in the batch."""
        running = {self.jobs[row.index].id: row.index for row in self.batch.rows}
        return running.get(id)


@dataclass
class Worker:
    """Makes videos. The newest run has priority; each older run gets one step before the next run is interleaved."""

    renderer: Renderer
    folder: Path
    owner: str
    send: Send
    inbox: "queue.SimpleQueue[Message | None]" = field(default_factory=queue.SimpleQueue)
    # messages received while decoding, to be handled afterwards
    later: deque[Message | None] = field(default_factory=deque)
    runs: list[Run] = field(default_factory=list)
    # the jobs whose video is being written, each with whether it was cancelled meanwhile
    writing: dict[str, bool] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "writer"))
    room: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(WRITING))

    def serve(self) -> None:
        """Handles messages and runs steps until the inbox yields None."""
        while True:
            waiting = not self.runs
            while waiting or self.later or not self.inbox.empty():
                message = self.later.popleft() if self.later else self.inbox.get()
                if message is None:
                    self.writer.shutdown()
                    return
                self.handle(message)
                waiting = False
            if self.runs:
                self.step_newest()

    def handle_cancellations(self) -> None:
        """Handles cancellations during decoding; other messages wait."""
        while not self.inbox.empty():
            message = self.inbox.get()
            if message is not None and message["do"] == "cancel":
                self.handle(message)
            else:
                self.later.append(message)

    def handle(self, message: Message) -> None:
        """Handles a message."""
        if message["do"] == "run":
            self.begin(message["run"], [Job.from_json(job) for job in message["jobs"]])
        elif message["do"] == "cancel":
            self.cancel(message["id"])
        else:
            raise ValueError(f"a worker's message is run or cancel, got {message['do']!r}")

    def report(self, id: str, event: events.Event) -> None:
        self.send({"say": "event", "id": id, "event": event.to_json()})

    def begin(self, number: int, jobs: list[Job]) -> None:
        """Starts a run; its texts are encoded at once."""
        for job in jobs:
            self.report(job.id, events.Started(len(jobs)))
            self.report(job.id, events.Stage("text"))
        batch = self.guarded(number, jobs, lambda: self.renderer.begin(jobs))
        if batch is None:
            self.free(number, {}, 0)
            return
        run = Run(number, jobs, batch)
        batch.on_part = partial(self.part_done, run)
        self.runs.append(run)
        for job in jobs:
            self.report(job.id, events.Stage("denoise"))

    def part_done(self, run: Run, done: int, total: int) -> None:
        """Reports a window of a step, at most twice a second."""
        now = time.monotonic()
        if now - run.told >= PREVIEW_EVERY:
            run.told = now
            for row in run.batch.rows:
                self.report(run.jobs[row.index].id, events.Part(done, total))

    def guarded(self, number: int, jobs: list[Job], work: Callable[[], Any]) -> Any:
        """Returns the result of `work` for jobs, None after reporting a failure. A fatal error ends the process."""
        try:
            return work()
        except (MemoryError, RuntimeError, ValueError) as error:
            if self.renderer.is_fatal(error):
                raise
            if self.renderer.is_shortage(error):
                code = events.OUT_OF_MEMORY
            else:
                code = events.INVALID_REQUEST if isinstance(error, ValueError) else events.GENERATION_FAILED
            log.warning("run %d: %s", number, error, exc_info=code == events.GENERATION_FAILED)
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.send({"say": "failed", "ids": [job.id for job in jobs], "code": code, "message": message})
        # after the handler, since the error's frames hold the tensors
        self.renderer.release()
        return None

    def step_newest(self) -> None:
        """Takes one step of the newest run. After its end the run below gets one step before another is interleaved."""
        run = self.runs[-1]
        self.step(run)
        if run not in self.runs and self.runs:
            self.step(self.runs[-1])

    def step(self, run: Run) -> None:
        running = [run.jobs[row.index] for row in run.batch.rows]

        def work() -> bool:
            self.renderer.step(run.batch)
            return True

        if self.guarded(run.number, running, work) is None:
            self.leave(run)
            return
        self.progress(run)
        if run.batch.done == run.batch.steps:
            self.finish(run)

    def progress(self, run: Run) -> None:
        """Reports a step, with a preview at most twice a second."""
        batch, now = run.batch, time.monotonic()
        left = batch.seconds["denoise"] / batch.done * (batch.steps - batch.done)
        show = now - run.shown >= PREVIEW_EVERY and batch.done < batch.steps
        run.shown = now if show else run.shown
        for row in batch.rows:
            picture = self.picture(row) if show else None
            self.report(run.jobs[row.index].id, events.Step(batch.done, batch.steps, round(left, 3), picture))

    def picture(self, row: Any) -> str | None:
        strip = self.renderer.preview(row)
        if strip is None:
            return None
        held = io.BytesIO()
        result_files.save_jpeg(strip, held, PREVIEW_QUALITY)
        return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()

    def finish(self, run: Run) -> None:
        """Decodes the videos of a run in turn; each is written while the next is decoded."""
        self.handle_cancellations()
        while run in self.runs:
            with contextlib.suppress(JobCancelled):
                self.decode(run, run.batch.rows[0])
            self.handle_cancellations()

    def decode(self, run: Run, row: Any) -> None:
        """Decodes a video and passes it to the writer; JobCancelled if its job is cancelled meanwhile."""
        job = run.jobs[row.index]

        def stop_if_cancelled(part: Any = None) -> None:
            self.handle_cancellations()
            if run.index(job.id) is None:
                raise JobCancelled

        self.report(job.id, events.Stage("decode"))
        video = self.guarded(run.number, [job], lambda: self.renderer.finish(run.batch, row, stop_if_cancelled))
        if video is not None:
            stop_if_cancelled()
            while not self.room.acquire(timeout=GLANCE):
                stop_if_cancelled()
            self.writing[job.id] = False
            self.writer.submit(self.write, job, video).add_done_callback(end_with)
        self.drop(run, row.index)

    def drop(self, run: Run, index: int) -> None:
        """Removes a video from a run; the run ends with its last video."""
        run.batch.drop(index)
        if not run.batch.rows:
            self.leave(run)

    def leave(self, run: Run) -> None:
        self.runs.remove(run)
        self.free(run.number, run.batch.seconds, run.batch.done)

    def free(self, number: int, seconds: dict[str, float], steps: int) -> None:
        counters = self.renderer.counters()
        self.send({"say": "free", "run": number, "seconds": seconds, "steps": steps, "counters": counters})

    def write(self, job: Job, video: Video) -> None:
        """Writes a video's files, on the writer thread."""
        start = time.perf_counter()
        self.report(job.id, events.Stage("encode"))
        try:
            about = result_files.write(video, self.folder, job.id, self.owner)
        except OSError as error:
            code = events.STORAGE_FULL if result_files.is_full(error, self.folder) else events.GENERATION_FAILED
            result_files.discard(self.folder, job.id)
            self.end(job, events.Failed(code, str(error), retry=True))
            return
        seconds = {**video.seconds, "encode": time.perf_counter() - start}
        self.end(job, events.Done(**about, seconds={stage: round(value, 4) for stage, value in seconds.items()}))

    def end(self, job: Job, event: events.Event) -> None:
        """Ends a job whose video has left the device."""
        self.room.release()
        with self.lock:
            cancelled = self.writing.pop(job.id)
        if cancelled:
            result_files.discard(self.folder, job.id)
            event = events.Failed(events.CANCELLED, "the job was cancelled")
        self.report(job.id, event)

    def cancel(self, id: str) -> None:
        """Cancels a job between two steps or parts of decoding; one that is being written ends after that."""
        with self.lock:
            if id in self.writing:
                self.writing[id] = True
        for run in list(self.runs):
            index = run.index(id)
            if index is not None:
                self.report(id, events.Failed(events.CANCELLED, "the job was cancelled"))
                self.drop(run, index)


def end_with(work: "Future[None]") -> None:
    """Exits after an unexpected error of the writer thread; the parent then restarts the worker."""
    if error := work.exception():
        log.error("the writer thread failed", exc_info=error)
        os._exit(1)


def start(message: Message, send: Send, inbox: "queue.SimpleQueue[Message | None]") -> Worker | None:
    """Loads and warms the model of a start message; None after reporting why that failed."""
    module, _, name = message["factory"].partition(":")
    try:
        renderer = getattr(import_module(module), name)(message["settings"])
        buckets = [tuple(bucket) for bucket in message["buckets"] or renderer.buckets()]
        measured = warm(renderer, buckets, message["max_batch"], message["known"], tuple(message["fast"]))
    except (VstarError, ValueError, MemoryError) as error:
        send({"say": "refused", "message": str(error), "exit_code": getattr(error, "exit_code", 2)})
        return None
    facts = renderer.facts()
    own = measured["stage_seconds"].get(bucket_name(16, facts["size"]))
    step = None if own is None else own["step"]
    send({"say": "ready", "facts": {**facts, **measured, "step_seconds": step}})
    return Worker(renderer, Path(message["folder"]), message["owner"], send, inbox)


def die_with_parent() -> None:
    """On Linux has the kernel kill this process when its parent ends; elsewhere the closed socket ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Runs the worker on the socket whose descriptor is the first argument."""
    die_with_parent()
    # a draining server stops its worker itself
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.dup2(2, 1)  # prints of libraries go to standard error
    link = socket.socket(fileno=int(sys.argv[1]))
    lines, lock = link.makefile("rb"), threading.Lock()

    def send(message: Message) -> None:
        try:
            with lock:
                link.sendall(json.dumps(message).encode() + b"\n")
        except ConnectionError:
            os._exit(0)

    inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()

    def listen() -> None:
        with contextlib.suppress(ConnectionError):
            while (line := lines.readline()).endswith(b"\n"):  # otherwise the end, or a line cut off by it
                inbox.put(json.loads(line))
        # the parent ended or closed the connection
        os._exit(0)

    # started before the model loads, which takes long: the parent may end meanwhile
    threading.Thread(target=listen, daemon=True).start()
    message = inbox.get()
    assert message is not None
    configure(message["log"], formatter(message.get("log_json", False)))
    worker = start(message, send, inbox)
    if worker is not None:
        # the model and the libraries stay for good, so later collections need not traverse them
        gc.collect()
        gc.freeze()
        worker.serve()
    os._exit(0)


if __name__ == "__main__":
    main()
