"""The long form of the reliability matrix: kills by the hundred, Postgres, a soak.

`make test-reliability` runs it at full length; `--kills` and `--soak` (minutes) scale it.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from support.servers import START, Server, Submitter, free_port
from vstar_engine.serving.jobs import events

pytestmark = pytest.mark.reliability

LEDGER = 600.0
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]
GROWTH = 100 * 2**20


def processes(server):
    """Returns the server's process and its workers', as far as they are there."""
    try:
        here = psutil.Process(server.process.pid)
        return here, [child for child in here.children() if "worker" in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return None, []


def test_kills_at_random_moments(tmp_path, pytestconfig):
    """F1 and F2 by the hundred: kill -9 of server or worker, also as they start; nothing accepted is lost or made twice."""
    count, chance = pytestconfig.getoption("kills"), random.Random(1)
    server, of = Server(tmp_path, slow={"step": 0.02}), {"server": 0, "server as it starts": 0, "worker": 0}
    starts = [server.start()]
    submitter = Submitter(server)
    try:
        while (killed := sum(of.values())) < count:
            time.sleep(chance.uniform(0.0, 1.0))
            _, workers = processes(server)
            kind = chance.choices(list(of), [2, 1, 1])[0]
            if kind == "worker" and workers:
                workers[0].kill()
            elif kind == "server as it starts":
                server.kill()
                server.spawn()
                time.sleep(chance.uniform(0.0, 2.0))
                server.kill()
                starts.append(server.start())
            else:
                kind = "server"
                server.kill()
                starts.append(server.start())
            of[kind] += 1
            if (killed + 1) % 50 == 0:
                print(f"{killed + 1} kills, {len(submitter.ids)} jobs", flush=True)
    finally:
        submitter.stop()
    try:
        assert not submitter.errors
        videos = server.ledger(submitter.ids, within=LEDGER)
    finally:
        server.__exit__()
    middle = sorted(starts)[len(starts) // 2]
    print(f"{of}, {len(videos)} jobs, ready after {middle:.1f} s (median), {max(starts):.1f} s at most")
    ends = Counter(video["error"]["code"] if video["error"] else video["status"] for video in videos)
    print(dict(ends))
    # a job whose worker is killed three times is taken for their cause
    assert ends.keys() <= {"completed", events.WORKER_CRASHED}
    assert ends["completed"] > 0.99 * len(videos)


# --- Postgres, from Debian's package, on loopback


@contextmanager
def postgres(folder):
    """Makes a database cluster and returns its address and a function that kills and starts it again."""
    if not POSTGRES:
        pytest.skip("needs Postgres: apt-get install postgresql")
    (bin,), port = POSTGRES, free_port()
    folder.mkdir()
    shutil.chown(folder, "postgres")
    for parent in folder.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o011)
    user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    subprocess.run(
        [*user, bin / "initdb", "-N", "-D", folder / "db", "-A", "trust", "-U", "vstar"], check=True, capture_output=True
    )
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"

    def start():
        words = [bin / "pg_ctl", "-D", folder / "db", "-o", options, "-l", folder / "log", "-w", "-t", str(START), "start"]
        subprocess.run([*user, *words], check=True, capture_output=True)

    def crash():
        first = psutil.Process(int((folder / "db" / "postmaster.pid").read_text().split()[0]))
        # what it started has the memory that the next one wants
        everything = [first, *first.children(recursive=True)]
        os.kill(first.pid, signal.SIGQUIT)
        psutil.wait_procs(everything, timeout=START)
        start()

    start()
    try:
        subprocess.run([*user, bin / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "vstar", "vstar"], check=True)
        yield f"postgresql://vstar@127.0.0.1:{port}/vstar", crash
    finally:
        subprocess.run([*user, bin / "pg_ctl", "-D", folder / "db", "-m", "immediate", "stop"], capture_output=True)


def test_kills_with_postgres(tmp_path, pytestconfig):
    """F1 on Postgres: the server is killed, and so is the database."""
    chance = random.Random(2)
    with postgres(tmp_path / "postgres") as (url, crash):
        server = Server(tmp_path / "server", "--database", url, slow={"step": 0.02})
        server.start()
        submitter = Submitter(server)
        try:
            for number in range(max(pytestconfig.getoption("kills") // 50, 3)):
                time.sleep(chance.uniform(0.2, 1.5))
                if number % 3 == 2:
                    crash()
                else:
                    server.kill()
                    server.start()
        finally:
            submitter.stop()
        try:
            assert not [error for error in submitter.errors if error.status != 503]
            videos = server.ledger(submitter.ids, within=LEDGER)
        finally:
            server.__exit__()
        assert {video["status"] for video in videos} == {"completed"}
        print(f"{len(videos)} jobs on Postgres")


def test_two_servers_share_a_database(tmp_path):
    """Each runs what it took; one that is killed takes its jobs up again when it is back, and none is made twice."""
    with postgres(tmp_path / "postgres") as (url, _):
        shared = ("--database", url, "--videos", str(tmp_path / "videos"))
        servers = [Server(tmp_path / name, *shared, "--instance", name, slow={"step": 0.05}) for name in ("one", "two")]
        try:
            for server in servers:
                server.start()
            ids = [servers[number % 2].create(f"job {number}") for number in range(16)]
            first, second = servers
            while not any(first.get(id)["step"] is None and first.get(id)["status"] == "in_progress" for id in ids):
                assert any(second.get(id)["status"] == "queued" for id in ids)
            servers[0].kill()
            servers[0].start()
            videos = servers[1].ledger(ids, within=120)
        finally:
            for server in servers:
                server.__exit__()
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == len(ids)
    assert {video["status"] for video in videos} == {"completed"}


# --- a soak


def bytes_in(folder):
    """Sums up what is in a folder that files leave meanwhile."""
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_soak(tmp_path, pytestconfig):
    """L3: jobs, cancellations and readers for many minutes; nothing fails, and memory, files and descriptors stay flat."""
    minutes = pytestconfig.getoption("soak")
    with Server(tmp_path, "--keep-mib", "20", slow={"step": 0.005}) as server:
        here, _ = processes(server)
        rounds, held, accepted, end = 0, [], [], time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            ids = [server.create("soak", num_frames=chance) for chance in (8, 8, 12, 16)]
            server.http.post(f"/v1/videos/{ids[-1]}/cancel")
            accepted += ids
            for id in ids:
                video = server.wait(id, within=60)
                assert video["status"] == "completed" or video["error"]["code"] == "cancelled"
            server.http.get(f"/v1/videos/{ids[0]}/content")
            if rounds % 10 == 0:
                held.append((here.memory_info().rss, here.num_fds()))
            rounds += 1
        settled = held[len(held) // 4]
        print(f"{4 * rounds} jobs in {minutes:g} minutes, {(held[-1][0] - settled[0]) / 2**20:.1f} MiB more than at a quarter")
        assert held[-1][0] - settled[0] < GROWTH
        assert held[-1][1] - settled[1] < 20
        # what is beyond the quota goes first: the ledger would find files of the list gone
        while bytes_in(server.videos) > 20 * 2**20:
            time.sleep(0.5)
        time.sleep(5.0)
        left = server.ledger(accepted, swept=True)
        assert {video["id"] for video in left} >= set(accepted[-4:])
