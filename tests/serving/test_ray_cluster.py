"""Replicas on a Ray cluster: token authentication, and two nodes in one process of which one dies."""

import asyncio
import contextlib
import hashlib
import itertools
import os
import random
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from support import slow_engine
from support.slow_engine import job
from vstar_engine.commands.main import main
from vstar_engine.commands.serve import parse_clip
from vstar_engine.errors import MissingLibrary
from vstar_engine.serving.jobs import events, result_files
from vstar_engine.serving.workers import ray_cluster
from vstar_engine.serving.workers.dispatch_state import BatchingPolicy
from vstar_engine.serving.workers.ray_cluster import RayEngine, RayLink, Replicas

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray (the `scale` extra)")
# starting Ray on two busy cores takes a minute
LIMIT = 400.0


def arrived(content=b"a video", sha256=None):
    """A message of a replica with the files of a video."""
    sha256 = sha256 or hashlib.sha256(content).hexdigest()
    done = events.Done("video_1.mp4", len(content), sha256, 8, 64, 32)
    files = dict(zip(result_files.names("video_1"), (content, b"thumbnail", b"sheet"), strict=True))
    return {"say": "event", "id": "video_1", "event": done.to_json()}, files


def test_files_of_a_replica_are_written_here_before_they_are_told_of(tmp_path):
    message, files = arrived()
    assert RayLink(0, tmp_path, "an-owner", {}, {}).keep(message, files) == message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_video_that_changed_on_its_way_is_no_result(tmp_path):
    message, files = arrived(sha256="0" * 64)
    event = RayLink(0, tmp_path, "an-owner", {}, {}).keep(message, files)["event"]
    assert (event["kind"], event["code"], event["retry"]) == ("failed", "generation_failed", True)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_full_is_said(tmp_path, monkeypatch):
    synced = itertools.count()

    def full(descriptor):
        if next(synced) == 4:  # two pictures are there, file and name, when the video finds no room
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    event = RayLink(0, tmp_path, "an-owner", {}, {}).keep(*arrived())["event"]
    assert (event["kind"], event["code"], event["retry"]) == ("failed", "storage_full", True)
    assert not list(tmp_path.iterdir())


def test_ray_without_authentication_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ValueError, match="must be token"):
        ray_cluster.library()


def test_ray_that_is_missing_says_what_to_install(monkeypatch, modules):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    modules({"ray": None})
    with pytest.raises(MissingLibrary, match="pip install 'ray"):
        ray_cluster.library()


def test_no_replica_is_no_engine():
    with pytest.raises(ValueError, match="at least 1 replica"):
        Replicas(0)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--replicas", "2"], "--replicas and --address are for --ray"),
        (["--address", "head:6379"], "--replicas and --address are for --ray"),
        (["--warm", "16x320"], "a size is HEIGHTxWIDTH"),
        (["--warm", "x320x512"], "a clip is FRAMESxHEIGHTxWIDTH"),
    ],
)
def test_options_of_scale_that_make_no_sense(tmp_path, capsys, words, complaint):
    assert main(["serve", "--model", "mini", "--data", str(tmp_path), "--no-synopsis", *words]) == 2
    assert complaint in capsys.readouterr().err


def test_a_clip_to_warm_is_read_as_the_command_line_says_sizes():
    assert parse_clip("64x320x512") == (64, 320, 512)


@pytest.fixture
def cluster():
    """A head without room for replicas and two nodes with room for one each, behind a token."""
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "PYTHONPATH")}
    os.environ |= {"RAY_AUTH_TOKEN": "0123456789abcdef" * 4, **slow_engine.environment()}
    ray_cluster.library()
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield cluster, nodes
    cluster.shutdown()
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@contextlib.asynccontextmanager
async def running(folder, address, **settings):
    policy = BatchingPolicy(buckets=(slow_engine.BUCKET,), hang_after=5.0, max_batch=1)
    replicas = Replicas(2, address)
    engine = RayEngine(Path(folder), settings, policy, slow_engine.FACTORY, slow_engine.environment(), replicas)
    async with asyncio.timeout(LIMIT):
        await engine.start()
        try:
            await until(lambda: engine.facts()["counters"]["workers"] == 2)
            yield engine
        finally:
            await engine.close(0)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.02)


async def events_of(engine, job, received):
    async for event in engine.submit(job):
        received.append(event)
    return received


def check_done(folder, jobs, received):
    """Every job ended once, in a file that is what was said of it."""
    for one, found in zip(jobs, received, strict=True):
        assert isinstance(found[-1], events.Done), found[-1]
        content = (folder / f"{one.id}.mp4").read_bytes()
        assert hashlib.sha256(content).hexdigest() == found[-1].sha256
    assert len(list(folder.glob("*.mp4"))) == len(jobs)
    assert not list(folder.glob(".*"))


@pytest.mark.reliability
@needs_ray
def test_neither_a_replica_nor_a_node_that_dies_loses_a_job(tmp_path, cluster):
    ray_cluster, nodes = cluster
    jobs = [job(f"tree {i}", seed=i, steps=20) for i in range(12)]

    async def scenario():
        import ray

        async with running(tmp_path, ray_cluster.address, step=0.2) as engine:
            received = [[] for _ in jobs]
            tasks = [asyncio.create_task(events_of(engine, one, found)) for one, found in zip(jobs, received, strict=True)]
            await until(lambda: sum(isinstance(event, events.Step) for found in received for event in found) > 10)
            busy = [worker for worker in engine.workers if worker.jobs]
            assert len(busy) == 2
            ray.kill(busy[0].link.actor)
            await until(lambda: engine.facts()["counters"]["restarts"] == 1)
            await asyncio.to_thread(ray_cluster.remove_node, nodes[0])
            await until(lambda: engine.facts()["counters"]["workers"] == 1)
            assert engine.ready
            await asyncio.gather(*tasks)
            ray_cluster.add_node(num_cpus=1)  # sets signal handlers, which only the main thread may
            await until(lambda: engine.facts()["counters"]["workers"] == 2)
            return received, engine.facts()["counters"]

    received, counters = asyncio.run(scenario())
    check_done(tmp_path, jobs, received)
    assert counters["retried"] == 2
    again = [found for found in received if sum(isinstance(event, events.Started) for event in found) > 1]
    assert 1 <= len(again) <= 2  # the node may die before the job that was sent there is received to begin


@pytest.mark.reliability
@needs_ray
def test_a_worker_that_is_stopped_on_a_node_is_ended_there(tmp_path, cluster):
    jobs = [job("stop@2", steps=5), job("a tree", steps=5), job(steps=5)]

    async def scenario():
        async with running(tmp_path, cluster[0].address, step=0.05) as engine:
            received = await asyncio.gather(*(events_of(engine, one, []) for one in jobs))
            return received, [await cancelled(engine)]

    async def cancelled(engine):
        one, received = job(steps=500), []
        task = asyncio.create_task(events_of(engine, one, received))
        await until(lambda: any(isinstance(event, events.Step) for event in received))
        await engine.cancel(one.id)
        return (await task)[-1]

    received, (last,) = asyncio.run(scenario())
    assert received[0][-1].code == events.WORKER_HUNG
    check_done(tmp_path, jobs[1:], received[1:])
    assert last.code == events.CANCELLED


@pytest.mark.reliability
@needs_ray
def test_who_has_no_token_is_not_let_in(cluster):
    code = "import sys; from vstar_engine.serving.workers.ray_cluster import connect; connect(sys.argv[1])"
    environment = {**os.environ, "RAY_AUTH_TOKEN": "f" * 64}
    command = [sys.executable, "-c", code, cluster[0].address]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode != 0
    assert "InvalidAuthToken" in done.stderr
    assert "WorkerError: cannot connect to a Ray cluster" in done.stderr


@pytest.mark.reliability
@needs_ray
def test_the_server_with_replicas_loses_nothing_when_it_is_killed(tmp_path):
    pytest.importorskip("dbos", reason="needs the serve extra")
    from support.servers import Server

    with Server(tmp_path, "--ray", "--replicas", "2", "--warm", "8x32x64", slow={"step": 0.2}) as server:
        ids = [server.create(f"tree {i}", num_inference_steps=10) for i in range(6)]
        server.wait(ids[0], "in_progress", "completed")
        server.kill()
        server.start()
        videos = server.ledger(ids, within=LIMIT)
        assert all(video["status"] == "completed" for video in videos)
        # longer than Ray lets a process live after SIGTERM
        last = server.create(num_inference_steps=30)
        server.wait(last, "in_progress")
        assert server.stop() == 0
        server.start()
        assert server.get(last)["status"] == "completed"


def victims():
    """Returns what there is to kill of the cluster that this process started: replicas, and the workers that they own."""
    found = {"replica": [], "worker": []}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            said = " ".join(process.cmdline())
            kind = (
                "replica"
                if said.startswith("ray::Replica")
                else "worker"
                if "vstar_engine.serving.workers.worker" in said
                else None
            )
            if kind is not None:
                found[kind].append(process)
    return found


@pytest.mark.reliability
@needs_ray
def test_a_kill_every_second_loses_nothing(tmp_path, pytestconfig, cluster):
    """F14: for a sixth of `--soak` a random replica or worker is killed each second, and once a node goes and one comes."""
    pytest.importorskip("dbos", reason="needs the serve extra")
    from support.servers import Server, Submitter

    ray_cluster, nodes = cluster
    ray_cluster.add_node(num_cpus=1)
    seconds, chance, kills = 10 * pytestconfig.getoption("soak"), random.Random(3), Counter()
    options = ("--ray", "--replicas", "3", "--address", ray_cluster.address, "--warm", "8x32x64")
    with Server(tmp_path, *options, slow={"step": 0.02}) as server:
        submitter, begun = Submitter(server), time.monotonic()
        try:
            while (passed := time.monotonic() - begun) < seconds:
                time.sleep(1 - passed % 1)
                kind, those = chance.choice([pair for pair in victims().items() if pair[1]] or [("nobody", [])])
                for process in chance.sample(those, min(len(those), 1)):
                    process.kill()
                kills[kind] += 1
                if "node" not in kills and passed > seconds / 2:
                    ray_cluster.remove_node(nodes[0])
                    ray_cluster.add_node(num_cpus=1)
                    kills["node"] += 1
            during, ended = time.monotonic() - begun, sum(video["status"] == "completed" for video in server.every())
        finally:
            submitter.stop()
        assert not submitter.errors
        asked = time.monotonic()
        videos = server.ledger(submitter.ids, within=LIMIT)
        settled = time.monotonic() - asked
        assert server.wait(server.create(), within=LIMIT)["status"] == "completed"
    ends = Counter(video["error"]["code"] if video["error"] else video["status"] for video in videos)
    print(f"{dict(kills)} in {during:.0f} s, {ended} completed meanwhile, all ended {settled:.1f} s after: {dict(ends)}")
    assert kills.keys() >= {"replica", "worker", "node"}
    assert ends.keys() <= {"completed", events.WORKER_CRASHED}
    assert ends["completed"]
