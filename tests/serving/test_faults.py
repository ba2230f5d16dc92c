"""Workers that die, hang or run out of memory, and weights that are not weights: what is accepted still ends, once."""

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from support.engines import engine_at
from support.servers import Server
from vstar_engine.artifacts.files import digest_of
from vstar_engine.config.models import MODELS
from vstar_engine.weights import bundled

# generous: other work may share the machine; docs/reliability.md has the figures of a quiet one
NOTICED, BACK, REFUSED = 5.0, 60.0, 180.0
# what damaged weights and engines may take to be refused, the start of Python counted, where nothing else runs
QUIET_WEIGHTS, QUIET_ENGINE = 5.0, 2.0
STEP = 0.2
# what a worker may hold on to of the 256 MiB that a job took before memory ran out
LEFT = 64 * 2**20
LONG = {"num_inference_steps": 20}
# of another shape, so that they are not batched with it
OTHER = {"num_frames": 12, "num_inference_steps": 20}
MINI = {"size": "64x32", "num_frames": 4, "num_inference_steps": 12, "synopsis": ["snow", "flowers"], "enhance_prompt": None}


def worker(server):
    """Returns the process in which the server's engine runs."""
    (found,) = [child for child in psutil.Process(server.process.pid).children() if "worker" in " ".join(child.cmdline())]
    return found


def counters(server):
    return server.http.get("/v1/models").json()["data"][0]["facts"]["counters"]


def until(condition, within):
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < within
        time.sleep(0.02)
    return time.monotonic() - begun


def readiness(server):
    return server.http.get("/readyz").status_code


def kill_worker(server, how=signal.SIGKILL):
    """Takes the worker away; returns the seconds until that was noticed, and until another was there."""
    gone = worker(server)
    gone.send_signal(how)
    noticed = until(lambda: readiness(server) == 503, NOTICED if how == signal.SIGKILL else BACK)
    return noticed, until(lambda: readiness(server) == 200, BACK)


def test_a_killed_worker_costs_its_job_one_more_try_and_others_nothing(tmp_path):
    """F2: kill -9 of the worker in the middle of a job."""
    with Server(tmp_path, slow={"step": STEP}) as server:
        first, second, third = server.create(**LONG), server.create(**OTHER), server.create(**OTHER)
        until(lambda: (server.get(first)["step"] or 0) >= 3, within=30)
        noticed, back = kill_worker(server)
        print(f"noticed after {noticed * 1e3:.0f} ms, ready again after {back:.2f} s")
        videos = server.ledger([first, second, third])
        assert {video["status"] for video in videos} == {"completed"}
        assert (counters(server)["restarts"], counters(server)["retried"]) == (1, 1)
        written = [json.loads(line) for line in server.log().splitlines()]
        assert [line for line in written if line["logger"].endswith("dispatcher") and "is restarted" in line["message"]]
        metrics = server.http.get("/metrics").text
        assert "vstar_worker_restarts_total 1.0" in metrics
        assert 'vstar_jobs_finished_total{status="completed"} 3.0' in metrics
        assert "vstar_embedding_cache_hits_total 0.0" in metrics


@pytest.mark.reliability
def test_a_poison_job_fails_after_three_tries_and_the_next_runs(tmp_path):
    """F3: a job that kills every worker it meets, beside one that crashes it once and one that does nothing."""
    with Server(tmp_path, slow={"step": 0.02}) as server:
        poison, after = server.create("segv@2", **LONG), server.create(**OTHER)
        failed = server.wait(poison, within=BACK)
        assert (failed["status"], failed["error"]["code"]) == ("failed", "worker_crashed")
        assert "3 times" in failed["error"]["message"]
        assert server.wait(after)["status"] == "completed"
        assert counters(server)["restarts"] == 3
        once = server.create("kill-once@2", **LONG)
        assert server.wait(once, within=BACK)["status"] == "completed"
        server.ledger([poison, after, once])


@pytest.mark.reliability
def test_memory_that_runs_out_fails_that_job_alone(tmp_path):
    """F5: a job that never fits fails with its code; one that fits only alone is made; the next runs on the same worker."""
    with Server(tmp_path, "--max-batch", "4", slow={"step": 0.02}) as server:
        large, after = server.create("memory@1", **LONG), server.create(**OTHER)
        crowd = [server.create("memory-batch@1", **LONG) for _ in range(3)]
        failed = server.wait(large)
        assert (failed["status"], failed["error"]["code"]) == ("failed", "out_of_memory")
        videos = server.ledger([large, after, *crowd])
        assert sum(video["status"] == "completed" for video in videos) == 4
        assert counters(server)["restarts"] == 0


@pytest.mark.reliability
def test_memory_that_the_system_refuses_fails_that_job_alone_and_comes_back(tmp_path):
    """F5 under a real limit: the same worker makes the next video, and holds no more than before."""
    with Server(tmp_path, slow={"step": 0.02}) as server:
        before = server.create(**LONG)
        server.wait(before)
        process = worker(server)
        held = process.memory_info().rss
        large, after = server.create("rlimit@1", **LONG), server.create(**OTHER)
        failed = server.wait(large)
        assert (failed["status"], failed["error"]["code"]) == ("failed", "out_of_memory")
        assert server.wait(after)["status"] == "completed"
        assert worker(server).pid == process.pid
        assert process.memory_info().rss < held + LEFT
        server.ledger([before, large, after])


@pytest.mark.reliability
def test_a_worker_that_hangs_is_ended_and_its_job_made(tmp_path):
    """F4: SIGSTOP in the middle of a job; the watchdog ends it once it has been silent for too long."""
    with Server(tmp_path, slow={"step": STEP}) as server:
        id = server.create(**LONG)
        until(lambda: (server.get(id)["step"] or 0) >= 3, within=30)
        noticed, _ = kill_worker(server, signal.SIGSTOP)
        print(f"ended after {noticed:.0f} s of silence")
        assert server.wait(id, within=BACK)["status"] == "completed"
        assert counters(server)["restarts"] == 1
        server.ledger([id])


@pytest.mark.reliability
def test_the_model_itself_lives_through_kills_and_cancels(tmp_path):
    """F1, F2 and F10 with the mini model: kill -9 of server and worker and a cancellation; bytes as if nothing had happened."""
    server = Server(tmp_path, model=True)
    server.start()
    try:
        quiet = server.create(seed=5, **MINI)
        wanted = server.wait(quiet, within=BACK)["sha256"]
        ids = [server.create(seed=5, **MINI) for _ in range(3)]
        until(lambda: (server.get(ids[0])["step"] or 0) >= 2, within=BACK)
        kill_worker(server)
        until(lambda: (server.get(ids[0])["step"] or 0) >= 2, within=BACK)
        server.kill()
        server.start()
        long = server.create(seed=6, **{**MINI, "num_frames": 16, "num_inference_steps": 100, "priority": 1})
        server.wait(long, "in_progress", within=BACK)
        until(lambda: (server.get(long)["step"] or 0) >= 1, within=BACK)
        begun = time.monotonic()
        assert server.http.post(f"/v1/videos/{long}/cancel").json()["error"]["code"] == "cancelled"
        freed = until(lambda: counters(server)["running"] == 0 or server.get(ids[-1])["status"] != "queued", within=BACK)
        print(f"cancelled in {time.monotonic() - begun:.2f} s, the worker free after {freed:.2f} s")
        videos = server.ledger([quiet, *ids, long], within=120)
    finally:
        server.__exit__()
    made = {video["id"]: video for video in videos}
    assert {made[id]["sha256"] for id in ids} == {wanted}
    assert made[long]["status"] == "failed"


# --- weights and engines that are not what they say


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


def cut(folder, proof):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def flip(folder, proof):
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)


def html(folder, proof):
    (folder / "model.safetensors").write_text("<!doctype html><title>404 Not Found</title>")


def bomb(folder, proof):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(proof)))


def no_manifest(folder, proof):
    (folder / "manifest.json").unlink()


def another(folder, proof):
    manifest = json.loads((folder / "manifest.json").read_text())
    whole = {name: value for name, value in manifest.items() if name != "sha256"} | {"model": "videocrafter2"}
    (folder / "manifest.json").write_text(json.dumps({**whole, "sha256": digest_of(whole)}))


def alone(folder, proof):
    """One file, that was cut, instead of a folder."""
    content = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    folder.write_bytes(content[: len(content) // 2])


def gone(folder, proof):
    shutil.rmtree(folder)


# one of each kind in every run of the tests: damage, and code that a pickle would run
@pytest.mark.parametrize(
    "damage",
    [
        flip,
        bomb,
        *(pytest.param(each, marks=pytest.mark.reliability) for each in (cut, html, no_manifest, another, alone, gone)),
    ],
    ids=lambda damage: damage.__name__,
)
def test_weights_that_are_damaged_are_refused_before_anything_runs(tmp_path, damage, pytestconfig):
    """F8: exit code 3 and a sentence, no code of the file run, no port opened, nothing made."""
    folder, proof = tmp_path / "weights", tmp_path / "proof"
    shutil.copytree(bundled.weights(MODELS["mini"]), folder)
    damage(folder, proof)
    done, seconds = served("--model", "mini", "--weights", str(folder), data=tmp_path / "data")
    print(f"refused after {seconds:.1f} s")
    assert seconds < (QUIET_WEIGHTS if pytestconfig.getoption("timed") else REFUSED)
    assert done.returncode == 3, done.stderr
    assert "vstar-engine: " in done.stderr.splitlines()[-1]
    assert str(folder) in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) == 1
    assert not proof.exists()
    assert not (tmp_path / "data").exists()


ENGINES = {
    "cut": lambda folder, proof: (folder / "unet.pt2").write_bytes(bytes(range(255))),
    "flipped": lambda folder, proof: (folder / "unet.pt2").write_bytes(bytes([*range(255), 0])),
    "html": lambda folder, proof: (folder / "unet.pt2").write_text("<!doctype html><title>404 Not Found</title>"),
    "bomb": lambda folder, proof: (folder / "unet.pt2").write_bytes(pickle.dumps(Bomb(proof))),
    "gone": lambda folder, proof: (folder / "unet.pt2").unlink(),
    "manifest cut": lambda folder, proof: (folder / "manifest.json").write_text('{"kind": "vstar-engi'),
    "weights": lambda folder, proof: (folder / "manifest.json").write_text('{"kind": "vstar-engine weights"}'),
    "writable by others": lambda folder, proof: folder.chmod(0o777),
}


@pytest.mark.parametrize(
    "damage",
    [name if name in ("flipped", "bomb") else pytest.param(name, marks=pytest.mark.reliability) for name in ENGINES],
)
def test_an_engine_that_is_damaged_is_refused_before_anything_runs(tmp_path, damage, pytestconfig):
    """F7: exit code 9 and a sentence, no code of the file run, no port opened, nothing made."""
    folder, proof = engine_at(tmp_path / "engine"), tmp_path / "proof"
    ENGINES[damage](folder, proof)
    done, seconds = served("--engine", str(folder), data=tmp_path / "data")
    print(f"refused after {seconds:.1f} s")
    assert seconds < (QUIET_ENGINE if pytestconfig.getoption("timed") else REFUSED)
    assert done.returncode == 9, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not proof.exists()
    assert not (tmp_path / "data").exists()


def test_an_engine_of_another_machine_is_refused_with_the_command_that_makes_it_anew(tmp_path):
    """F7: it is whole, so the worker is asked, whose libraries know better; the server then ends with the same code."""
    folder = engine_at(tmp_path / "engine", sources="0" * 64)
    done, seconds = served("--engine", str(folder), data=tmp_path / "data")
    print(f"refused after {seconds:.1f} s")
    assert done.returncode == 9, done.stderr
    assert "rebuild it: vstar-engine build" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_refused(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done, _ = served(
            "--renderer", "support.slow_engine:load", "--port", str(other.getsockname()[1]), data=tmp_path / "data"
        )
    assert done.returncode == 2, done.stderr
    assert "Address already in use; give another --host or --port" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


FAST = {
    "fast must name some of": ("--fast", "faster"),
    "step-cache does not compose with few-step": ("--fast", "few-step,step-cache"),
}


@pytest.mark.parametrize("complaint", FAST)
def test_ways_to_be_faster_that_cannot_be(complaint, tmp_path):
    done, _ = served(*FAST[complaint], data=tmp_path / "data")
    assert done.returncode == 2, done.stderr
    assert complaint in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def served(*options, data):
    """Runs `serve` until it ends by itself."""
    command = [sys.executable, "-m", "vstar_engine", "serve", "--port", "0", "--log-text", "--data", str(data), *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=REFUSED, env=environment)
    return done, time.monotonic() - begun
