"""Disks that fail at each kind of write, sync, truncation and rename: what is accepted ends, nothing half-written is served.

strace answers system calls with an error: some of a running server's and its worker's for a while, or the nth of one that
starts. Part of the long form, `make test-reliability`.
"""

import hashlib
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from support.servers import START, Server
from vstar_engine.serving.http.api_keys import LOCAL
from vstar_engine.serving.jobs import result_files
from vstar_engine.serving.settings import Settings

pytestmark = pytest.mark.reliability

ERRORS = ["EIO", "ENOSPC"]
DATABASE, RESULTS = "database", "results"
# what fails: (which calls, on whose files)
WHILE_IT_RUNS = {
    "database write": ("pwrite64", DATABASE),
    "database sync": ("fsync,fdatasync", DATABASE),
    "result creation": ("open,openat", RESULTS),
    "result write": ("write,pwrite64,writev", RESULTS),
    "result sync": ("fsync,fdatasync", RESULTS),
    "result rename": ("rename,renameat,renameat2", RESULTS),
}
AS_IT_STARTS = {
    "database creation": ("open,openat", DATABASE),
    "database write": ("pwrite64", DATABASE),
    "database sync": ("fsync,fdatasync", DATABASE),
    "database size": ("ftruncate,fallocate", DATABASE),
}
FAILING = 6.0  # seconds
# which calls of a thread fail, so that about half of what is written does not go through
EVERY = {DATABASE: "5+29", RESULTS: "2+7"}
# jobs that may be sent while the disk fails, and the calls of a start that are made to fail in turn
JOBS, CALLS = 60, 12
CANNOT_OPEN = 4


def needs_strace():
    if shutil.which("strace") is None:
        pytest.skip("needs strace: apt-get install strace")


def database_files(server):
    data = (server.folder / "data").absolute()
    return [data / name for name in ("jobs.sqlite", "jobs.sqlite-wal", "jobs.sqlite-shm")]


def worker_of(server):
    (found,) = [child for child in psutil.Process(server.process.pid).children() if "worker" in " ".join(child.cmdline())]
    return found.pid


def key(number):
    return f"the disk fails, {number}"


def id_of(number):
    """Returns the id that a server without keys derives from `key`, so that the files of a job are known before it is sent."""
    return "video_" + hashlib.sha256(f"{LOCAL}\0{key(number)}".encode()).hexdigest()[:32]


def files_to_come(server):
    """Names what the worker will write for the jobs to come, aside and in place, and their folder."""
    folder, owner = (server.folder / "data" / "videos").absolute(), result_files.owner_of(Settings.instance)
    final = [folder / name for number in range(JOBS) for name in result_files.names(id_of(number))]
    return [folder, *final, *(path.with_name(f".{path.name}.{owner}.partial{path.suffix}") for path in final)]


def words(calls, watched, error, when, log):
    paths = [word for path in watched for word in ("-P", str(path))]
    inject = f"inject={calls}:error={error}:when={when}"
    return ["strace", "-f", "-qq", "-o", str(log), *paths, "-e", f"trace={calls}", "-e", inject]


def tracer_of(pid):
    return int(
        next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("TracerPid")).split()[1]
    )


@contextmanager
def failing(server, calls, whose, error):
    """Lets some calls on some files fail for a while, in every thread of a running server and its worker."""
    pids = [server.process.pid, worker_of(server)]
    watched = database_files(server) if whose == DATABASE else files_to_come(server)
    traced = words(calls, watched, error, EVERY[whose], server.folder / "trace") + [
        word for pid in pids for word in ("-p", str(pid))
    ]
    tracer = subprocess.Popen(traced, stderr=subprocess.PIPE, text=True)
    try:
        while {tracer_of(pid) for pid in pids} != {tracer.pid}:
            if tracer.poll() is not None:
                pytest.skip(f"needs the right to trace other processes: {tracer.stderr.read().splitlines()[0]}")
            time.sleep(0.02)
        yield
    finally:
        tracer.terminate()
        tracer.wait()


def injected(log):
    return log.read_text(errors="replace").count("(INJECTED)")


def submit_for(server, seconds):
    """Sends jobs for a while, each until it is accepted; returns the ids and what else was answered."""
    accepted, refused, end = [], [], time.monotonic() + seconds
    for number in range(JOBS):
        while time.monotonic() < end:
            answer = server.post(f"job {number}", {"idempotency-key": key(number)})
            if answer.status_code == 200:
                accepted.append(answer.json()["id"])
                assert accepted[-1] == id_of(number)
                break
            assert "error" in answer.json()
            refused.append(answer.status_code)
            time.sleep(0.05)
        time.sleep(seconds / JOBS / 2)
    return accepted, refused


def served_is_whole(server, ids):
    """Checks that whatever can be fetched now is what its record says."""
    for id in ids:
        video, answer = server.http.get(f"/v1/videos/{id}"), server.http.get(f"/v1/videos/{id}/content")
        if answer.status_code == 200:
            assert hashlib.sha256(answer.content).hexdigest() == server.get(id)["sha256"]
        else:
            assert answer.status_code in (404, 409, 422, 503, 507), answer.text
        assert video.status_code in (200, 503, 507), video.text


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("what", WHILE_IT_RUNS)
def test_a_disk_that_fails_for_a_while(tmp_path, what, error):
    """The server stays; each job that it accepted is made once the disk works again, also after a kill -9 at the end."""
    needs_strace()
    calls, whose = WHILE_IT_RUNS[what]
    with Server(tmp_path, slow={"step": 0.01}) as server:
        before = [server.create("before") for _ in range(2)]
        server.ledger(before)
        with failing(server, calls, whose, error):
            accepted, refused = submit_for(server, FAILING)
            served_is_whole(server, [*before, *accepted])
        assert server.process.poll() is None, server.log()[-3000:]
        begun = time.monotonic()
        server.ledger([*before, *accepted], within=60, more=True)
        settled = time.monotonic() - begun
        server.kill()
        server.start()
        videos = server.ledger([*before, *accepted], within=60, more=True)
    failures = injected(tmp_path / "trace")
    ended = sorted({video["error"]["code"] if video["error"] else "completed" for video in videos})
    print(
        f"{what}, {error}: {failures} failures, {len(accepted)} accepted, refused {len(refused)} times {sorted(set(refused))}, "
        f"ended {ended}, {settled:.1f} s after the disk works again"
    )
    assert failures > 0
    assert set(refused) <= {429, 503, 507}
    assert ended == ["completed"]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("what", AS_IT_STARTS)
def test_a_disk_that_fails_as_the_server_starts(tmp_path, what, error):
    """The first call fails, then at the next start the second, and so on: it serves, or says in a sentence why not."""
    needs_strace()
    calls, _ = AS_IT_STARTS[what]
    server, outcomes = Server(tmp_path, slow={"step": 0.01}), []
    server.start()
    try:
        before = [server.create("before") for _ in range(2)]
        server.ledger(before)
        server.kill()
        for number in range(1, CALLS + 1):
            log = tmp_path / f"trace-{number}"
            server.prefix = words(calls, database_files(server), error, str(number), log)
            code = serves_or_ends(server)
            outcomes.append(code)
            if code is None:
                server.kill_all()
            if not injected(log):
                break
        server.prefix = []
        server.start()
        videos = server.ledger(before)
    finally:
        server.__exit__()
    refused = sum(code is not None for code in outcomes)
    print(f"{what}, {error}: {len(outcomes)} starts, {refused} refused with a sentence")
    assert {video["status"] for video in videos} == {"completed"}
    assert injected(tmp_path / "trace-1")


def serves_or_ends(server):
    """Starts it; returns None where it answers, else its exit code, after a look at what it said."""
    said = len(server.log())
    server.spawn()
    end = time.monotonic() + START
    while server.process.poll() is None and time.monotonic() < end:
        if server.answers():
            return None
        time.sleep(0.05)
    words = server.log()[said:]
    assert server.process.returncode == CANNOT_OPEN, words[-3000:]
    assert words.splitlines()[-1].startswith("vstar-engine: "), words[-3000:]
    assert "Traceback" not in words
    return server.process.returncode
