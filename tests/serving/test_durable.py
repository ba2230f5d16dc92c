"""What is accepted is never lost: load, overload, kills, full disks and orderly ends; a ledger closes every run."""

import gc
import random
import shutil
import sqlite3
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from support.servers import SMALL, Server
from vstar_engine.bench.harness.rows import read
from vstar_engine.commands.main import main

# generous: other work may share the machine; with --timed none does, and these are the figures wanted
POST_P99, GET_P99, READY = 10.0, 1.0, 120.0
QUIET_POST_P99, QUIET_GET_P99, QUIET_READY = 0.1, 0.02, 5.0
QUICK = {"num_inference_steps": 1}
TINY_DISK = 24  # MiB


def p99(seconds):
    return sorted(seconds)[int(len(seconds) * 0.99)]


def timed(server, method, path, **body):
    begun = time.monotonic()
    answer = server.http.request(method, path, **body)
    return answer, time.monotonic() - begun


def submit(server, count, at_once, **fields):
    """Posts jobs from several clients; returns the answers and their seconds."""

    def post(number):
        return timed(server, "POST", "/v1/videos", json={"prompt": f"job {number}", **SMALL, **fields})

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(post, range(count)))


@pytest.mark.parametrize("jobs", [40, pytest.param(300, marks=pytest.mark.reliability)])
def test_load(tmp_path, pytestconfig, jobs):
    """L1: so many jobs from 16 clients, none lost."""
    gc.freeze()  # else what is measured is this process at collecting what other tests imported, for 170 ms
    with Server(tmp_path, "--max-queue", "400", slow={"step": 0.0}) as server:
        answers = submit(server, jobs, 16, **QUICK)
        assert {answer.status_code for answer, _ in answers} == {200}
        ids = [answer.json()["id"] for answer, _ in answers]
        reads = [timed(server, "GET", f"/v1/videos/{id}")[1] for id in ids]
        print(f"POST p99 {p99([s for _, s in answers]) * 1e3:.0f} ms, GET p99 {p99(reads) * 1e3:.1f} ms")
        timed_too = pytestconfig.getoption("timed")
        assert p99([seconds for _, seconds in answers]) < (QUIET_POST_P99 if timed_too else POST_P99)
        assert p99(reads) < (QUIET_GET_P99 if timed_too else GET_P99)
        videos = server.ledger(ids, within=120)
        assert {video["status"] for video in videos} == {"completed"}


@pytest.mark.reliability
def test_overhead(tmp_path, pytestconfig):
    """What the server adds to the bare engine for one video: 50 ms and a hundredth at most."""
    if not pytestconfig.getoption("timed"):
        pytest.skip("needs --timed, and a machine that does nothing else")
    assert main(["bench", "serve", "--parts", "overhead", "--out", str(tmp_path / "rows.jsonl")]) == 0
    (row,) = read([tmp_path / "rows.jsonl"])
    assert row.status == "ok", row.note
    print(f"{row.numbers['overhead'] * 1e3:.0f} ms, allowed {row.numbers['allowed'] * 1e3:.0f}")
    assert row.numbers["overhead"] < row.numbers["allowed"]


def test_overload(tmp_path):
    """L2: ten times the bound; exactly the bound is accepted, also by owner, and memory stays."""
    keys, ids = ("alice alice-key-0123456789", "bob bob-key-0123456789abc"), []
    with Server(tmp_path, "--max-queue", "12", "--max-queue-per-key", "8", keys=keys) as server:
        process = psutil.Process(server.process.pid)
        held = process.memory_info().rss
        for key, room in (("alice-key-0123456789", 8), ("bob-key-0123456789abc", 4)):
            server.http.headers["authorization"] = f"Bearer {key}"
            answers = [answer for answer, _ in submit(server, 80, 16, prompt="step=1", num_inference_steps=100)]
            accepted = [answer for answer in answers if answer.status_code == 200]
            assert len(accepted) == room
            refused = [answer for answer in answers if answer.status_code == 429]
            assert len(refused) == 80 - room
            assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
            wanted = {"key_queue_full"} if room == 8 else {"queue_full"}
            assert {answer.json()["error"]["code"] for answer in refused} == wanted
            ids += [answer.json()["id"] for answer in accepted]
        gone = server.http.post(f"/v1/videos/{accepted[0].json()['id']}/cancel")
        assert gone.json()["error"]["code"] == "cancelled"
        ids.append(server.create())
        grown = (process.memory_info().rss - held) / 2**20
        print(f"the server holds {grown:.1f} MiB more")
        assert grown < 50
        server.cancel_all()
        server.ledger(ids)


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.reliability)])
def test_kills(tmp_path, pytestconfig, kills):
    """F1: 24 jobs, so many times kill -9 of the server at a random moment."""
    chance, ids, starts = random.Random(0), [], []
    server = Server(tmp_path, slow={"step": 0.04})
    starts.append(server.start())
    try:
        for number in range(24):
            ids.append(server.create(f"job {number}", seed=number))
        for turn in range(kills):
            time.sleep(chance.uniform(0.1, 1.0))
            server.kill()
            starts.append(server.start())
            if turn == 0:  # F13: the second try of a client that lost its reply and has no key finds the job of its first
                again = server.post("job 23", seed=23, headers={"x-stainless-retry-count": "1"})
                assert again.json()["id"] == ids[23]
        videos = server.ledger(ids)
    finally:
        server.__exit__()
    assert {video["status"] for video in videos} == {"completed"}
    assert {video["seed"] for video in videos} == set(range(24))
    print(f"ready after {max(starts):.1f} s at most")
    assert max(starts) < (QUIET_READY if pytestconfig.getoption("timed") else READY)


@pytest.mark.parametrize("grace", [20, pytest.param(1, marks=pytest.mark.reliability)])
def test_orderly_end(tmp_path, grace):
    """F9: what runs is finished within the time of grace, else made at the next start; what waits waits."""
    server = Server(tmp_path, "--grace", str(grace))
    server.start()
    try:
        running = server.create("step=0.1", num_inference_steps=40)
        server.wait(running, "in_progress")
        waiting = server.create("another shape", num_frames=16, num_inference_steps=150)
        asked = time.monotonic()
        server.process.terminate()
        server.wait_for("/readyz", 503, within=2)
        refused = server.post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert server.get(running)["status"] == "in_progress"
        assert server.process.wait(60) == 0
        assert time.monotonic() - asked < grace + 5
        server.start()
        assert (server.get(running)["status"] == "completed") == (grace == 20)
        videos = server.ledger([running, waiting])
        assert {video["status"] for video in videos} == {"completed"}
    finally:
        server.__exit__()


@pytest.mark.parametrize("seconds", [2, pytest.param(20, marks=pytest.mark.reliability)])
def test_locked_database(tmp_path, seconds):
    """F15: another process holds the lock on writing: requests wait or are refused, what runs is recorded once it is let go."""
    with Server(tmp_path, slow={"step": 0.1}) as server:
        running = server.create()
        server.wait(running, "in_progress")
        held = sqlite3.connect(tmp_path / "data" / "jobs.sqlite", isolation_level=None, timeout=30)
        held.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.post)
            time.sleep(seconds)
            assert server.get(running)["status"] == "in_progress"
            assert server.http.get("/livez").status_code == 200
            held.execute("ROLLBACK")
            held.close()
            answer = asked.result()
        assert answer.status_code in (200, 503), answer.text
        accepted = [answer.json()["id"]] if answer.status_code == 200 else []
        assert server.wait(running)["status"] == "completed"
        server.ledger([running, *accepted, server.create()], more=answer.status_code == 503)


def can_mount():
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0


def fill(folder):
    """Writes until there is no room, and returns the file to remove."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return filler


@pytest.mark.reliability
def test_full_disk(tmp_path):
    """F6: full while a job runs and when its end is to be recorded: it completes soon after there is room again."""
    if not can_mount():
        pytest.skip("needs unshare and the right to mount a small file system")
    mount = f'mkdir -p {tmp_path}/data && mount -t tmpfs -o size={TINY_DISK}m tmpfs {tmp_path}/data && exec "$@"'
    with Server(tmp_path, "--min-free", "1", prefix=("unshare", "-rm", "sh", "-c", mount, "sh")) as server:
        inside = Path(f"/proc/{server.process.pid}/root{tmp_path}/data")
        before = server.wait(server.create())
        running = server.create("step=0.1", num_inference_steps=20)
        server.wait(running, "in_progress")
        filler = fill(inside)
        refused = server.post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full")
        time.sleep(5)
        assert server.get(running)["status"] in ("queued", "in_progress")
        assert not list((inside / "videos").glob(f"{running}*"))
        filler.unlink()
        assert server.wait(running, within=60)["status"] == "completed"
        after = server.wait(server.create())
        assert {before["status"], after["status"]} == {"completed"}
        server.ledger([before["id"], running, after["id"]])
