"""How many threads compute and how they wait: what processes of ours get, and what a host is told."""

import asyncio
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vstar_engine import Engine
from vstar_engine.commands import installation
from vstar_engine.machine import threads
from vstar_engine.machine.threads import COUNT, PASSIVE, POLICY, SPIN_COUNT, SPINS, WAITING, Cores, cores, environment
from vstar_engine.serving.workers.local_process import ProcessLink

ROOT = Path(__file__).parent.parent
V2 = "0::{}\n"
V1 = "4:memory:/elsewhere\n2:cpu,cpuacct:{}\n1:name=systemd:/\n0::/\n"
MOUNT_V2 = "30 1 0:28 {} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNT_V1 = (
    "31 1 0:29 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "33 31 0:31 {} /sys/fs/cgroup/cpu\\040time rw shared:7 master:2 - cgroup cgroup rw,cpu,cpuacct\n"
)


def machine(root, cgroup, mounts, files):
    """Writes a stand-in for what the kernel says of control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(mounts)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def v1(folder, quota, period=100_000):
    folder = f"cpu time/{folder}"
    return {f"{folder}cpu.cfs_quota_us": f"{quota}\n", f"{folder}cpu.cfs_period_us": f"{period}\n"}


def many(monkeypatch, allowed=64):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(allowed)))


QUOTAS = {
    "v2": (V2.format("/a/b"), MOUNT_V2.format("/"), {"a/b/cpu.max": "300000 100000\n"}, 3.0, 3),
    "v2, the parent's is smaller": (
        V2.format("/a/b"),
        MOUNT_V2.format("/"),
        {"a/b/cpu.max": "800000 100000\n", "a/cpu.max": "150000 50000\n", "cpu.max": "max 100000\n"},
        3.0,
        3,
    ),
    "v2, none": (V2.format("/a"), MOUNT_V2.format("/"), {"a/cpu.max": "max 100000\n"}, None, 64),
    "v2, a part of a core": (V2.format("/a"), MOUNT_V2.format("/"), {"a/cpu.max": "20000 100000\n"}, 0.2, 1),
    "v2, not whole": (V2.format("/a"), MOUNT_V2.format("/"), {"a/cpu.max": "250000 100000\n"}, 2.5, 2),
    "v2, mounted at the own group": (V2.format("/pod/c"), MOUNT_V2.format("/pod"), {"c/cpu.max": "200000 100000\n"}, 2.0, 2),
    "v2, namespace": (V2.format("/../other"), MOUNT_V2.format("/"), {"cpu.max": "200000 100000\n"}, 2.0, 2),
    "v2, mount of another group": (V2.format("/x"), MOUNT_V2.format("/pod"), {"cpu.max": "400000 100000\n"}, 4.0, 4),
    "v2, damaged": (V2.format("/a"), MOUNT_V2.format("/"), {"a/cpu.max": "lots\n"}, None, 64),
    "v1": (V1.format("/a"), MOUNT_V1.format("/"), v1("a/", 400_000), 4.0, 4),
    "v1, the parent's is smaller": (V1.format("/a"), MOUNT_V1.format("/"), {**v1("a/", -1), **v1("", 200_000)}, 2.0, 2),
    "v1, none": (V1.format("/"), MOUNT_V1.format("/"), v1("", -1), None, 64),
    "v1 and v2": (
        V1.format("/a"),
        MOUNT_V1.format("/") + MOUNT_V2.format("/"),
        {**v1("a/", 400_000), "cpu.max": "300000 100000\n"},
        3.0,
        3,
    ),
}


@pytest.mark.parametrize(("cgroup", "mounts", "files", "quota", "usable"), QUOTAS.values(), ids=QUOTAS)
def test_the_smallest_quota_of_the_groups_above_counts(monkeypatch, tmp_path, cgroup, mounts, files, quota, usable):
    many(monkeypatch)
    here = cores(machine(tmp_path, cgroup, mounts, files))
    assert (here, here.usable) == (Cores(64, 64, quota), usable)


def test_a_machine_without_control_groups_has_no_quota(monkeypatch, tmp_path):
    many(monkeypatch, allowed=5)
    assert cores(tmp_path) == Cores(64, 5, None)
    assert cores(tmp_path).usable == 5


def test_cores_that_a_process_may_not_use_do_not_count(monkeypatch, tmp_path):
    many(monkeypatch, allowed=2)
    root = machine(tmp_path, V2.format("/"), MOUNT_V2.format("/"), {"cpu.max": "800000 100000\n"})
    assert cores(root).usable == 2
    # OpenMP counts those by itself
    assert COUNT not in environment({}, root)


def test_a_process_of_ours_waits_passively_with_as_many_threads_as_the_quota_has_cores(monkeypatch, tmp_path):
    many(monkeypatch)
    root = machine(tmp_path, *QUOTAS["v2"][:3])
    assert environment({"HOME": "/"}, root) == {"HOME": "/", POLICY: PASSIVE, SPINS: SPIN_COUNT, COUNT: "3"}


@pytest.mark.parametrize("given", [{name: "1", COUNT: "128"} for name in WAITING], ids=WAITING)
def test_what_the_user_set_stays(monkeypatch, tmp_path, given):
    many(monkeypatch)
    assert environment(given, machine(tmp_path, *QUOTAS["v2"][:3])) == given


def test_an_empty_setting_is_none(monkeypatch, tmp_path):
    many(monkeypatch)
    found = environment({POLICY: "", COUNT: ""}, machine(tmp_path, *QUOTAS["v2"][:3]))
    assert found == {POLICY: PASSIVE, SPINS: SPIN_COUNT, COUNT: "3"}


def set_here(monkeypatch, **settings):
    """Makes this process's environment a user's who sets these alone."""
    for name in (*WAITING, COUNT):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


def bare(**settings):
    """This process's environment as a user's who sets nothing else."""
    return {**{name: value for name, value in os.environ.items() if name not in (*WAITING, COUNT)}, **settings}


def said_by(code, **settings):
    words = [sys.executable, "-c", code]
    return subprocess.run(words, env=bare(**settings), capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()


SHOW = f"import os; print(os.environ.get({POLICY!r}), os.environ.get({COUNT!r}))"


def test_an_import_sets_nothing():
    modules = ("machine.threads", "commands.main", "engine", "serving.workers.worker")
    imports = "".join(f"import vstar_engine.{module}; " for module in modules)
    assert said_by(imports + SHOW) == ["None", "None"]


@pytest.mark.parametrize(
    "code",
    [
        "from vstar_engine.commands.main import main; main(['inspect', 'nothing.mp4']); ",
        "from vstar_engine.bench.__main__ import main; main(['report', 'nothing.jsonl']); ",
        "import tools.mini.train; ",
    ],
    ids=["command", "bench", "tools"],
)
def test_programs_of_ours_set_it_and_leave_what_is_set(code):
    assert said_by(code + SHOW)[-2] == PASSIVE
    assert said_by(code + SHOW, OMP_WAIT_POLICY="active", OMP_NUM_THREADS="7")[-2:] == ["active", "7"]


def test_a_command_sets_it_before_pytorch_reads_it():
    """GNU's runtime prints what it read when it was loaded."""
    code = "import sys; from vstar_engine.commands.main import main; sys.exit(main(['doctor']))"
    words, settings = [sys.executable, "-c", code], bare(OMP_DISPLAY_ENV="TRUE")
    done = subprocess.run(words, env=settings, capture_output=True, text=True, cwd=ROOT, check=True)
    if "OMP_WAIT_POLICY" not in done.stderr:
        pytest.skip("this PyTorch has another OpenMP runtime than GNU's or LLVM's")
    assert {line.split("= ")[1].strip("'") for line in done.stderr.splitlines() if "OMP_WAIT_POLICY" in line} == {"PASSIVE"}
    assert {line.split("= ")[1].strip("'") for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line} <= {SPIN_COUNT}


@pytest.mark.parametrize(("given", "wanted"), [({}, PASSIVE), ({POLICY: "active"}, "active")], ids=["default", "given"])
def test_children_that_convert_wait_passively(monkeypatch, tmp_path, given, wanted):
    from vstar_engine.weights import convert

    set_here(monkeypatch, **given)
    started = []

    def popen(command, env, **how):
        started.append(env)
        raise RuntimeError("not in this test")

    monkeypatch.setattr(subprocess, "Popen", popen)
    source = tmp_path / "model.ckpt"
    source.write_bytes(b"\x80anything")
    with pytest.raises(RuntimeError, match="not in this test"):
        convert.convert(source, tmp_path / "out")
    assert [env[POLICY] for env in started] == [wanted]


@pytest.mark.parametrize(
    ("given", "own", "wanted"),
    [({}, {}, (PASSIVE, "3")), ({POLICY: "active"}, {COUNT: "5"}, ("active", "5"))],
    ids=["default", "given"],
)
def test_a_worker_waits_passively(monkeypatch, tmp_path, given, own, wanted):
    """One of a server, or of a replica on a Ray cluster: both are started by this link."""
    many(monkeypatch)
    set_here(monkeypatch, **given)
    here = Cores(64, 64, 3.0)
    monkeypatch.setattr(threads, "cores", lambda root: here)
    started = []

    async def start(*command, env, **how):
        started.append(env)
        raise OSError("not in this test")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    with pytest.raises(OSError, match="not in this test"):
        asyncio.run(ProcessLink(tmp_path, own, "owner").open({"do": "start"}))
    assert [(env[POLICY], env[COUNT]) for env in started] == [wanted]


@pytest.fixture
def host(monkeypatch, tmp_path, caplog):
    """A host's process, which loaded PyTorch without our settings."""
    set_here(monkeypatch)
    monkeypatch.setattr(threads, "_warned", set())
    caplog.set_level(logging.WARNING, "vstar_engine.machine.threads")
    return tmp_path


def test_a_host_is_told_once_what_to_add(host, caplog, monkeypatch):
    monkeypatch.setenv(COUNT, "2")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Engine.load("mini")
        Engine.load("mini")
    finally:
        torch.set_num_threads(before)
    (told,) = caplog.messages
    assert told.endswith('before PyTorch is imported, add: import os; os.environ.setdefault("OMP_WAIT_POLICY", "passive")')


@pytest.mark.parametrize("settings", [{POLICY: "active"}, {"GOMP_SPINCOUNT": "1000"}], ids=str)
def test_a_host_that_chose_is_told_nothing(host, caplog, monkeypatch, settings):
    set_here(monkeypatch, **settings)
    threads.warn(2, host)
    assert caplog.messages == []


def test_one_thread_has_nobody_to_wait_for(host, caplog):
    threads.warn(1, host)
    assert caplog.messages == []


def test_a_host_with_more_threads_than_its_quota_is_told_once(host, caplog, monkeypatch):
    many(monkeypatch)
    monkeypatch.setenv(POLICY, PASSIVE)
    root = machine(host, *QUOTAS["v2"][:3])
    for _ in range(2):
        threads.warn(64, root)
    (told,) = caplog.messages
    assert told.endswith("64 threads where this process has the time of 3 cores; add: torch.set_num_threads(3)")


def facts(in_use, here):
    return {fact.name: fact for fact in installation.cpu_facts(in_use, here, 1.5)}


def test_doctor_shows_cores_quota_threads_and_waiting(monkeypatch):
    set_here(monkeypatch, OMP_WAIT_POLICY="passive")
    found = facts(2, Cores(8, 4, 2.5))
    assert found["cpu"].value == "8 cores, 4 allowed to this process, 1.5 GiB of memory free"
    assert found["cpu quota"].value == "2.5 cores, by the control group"
    assert (found["threads"].value, found["threads"].ok) == ("2 in use", True)
    assert (found["waiting"].value, found["waiting"].ok) == ("OMP_WAIT_POLICY=passive", True)


def test_doctor_shows_all_that_ours_set(monkeypatch):
    monkeypatch.setattr(os, "environ", bare(**environment({})))
    waiting = facts(2, Cores(2, 2, None))["waiting"]
    assert (waiting.value, waiting.ok) == ("OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=300", True)


def test_doctor_remarks_on_more_threads_than_cores_and_on_spinning(monkeypatch):
    set_here(monkeypatch, OMP_WAIT_POLICY="ACTIVE")
    found = facts(8, Cores(2, 2, None))
    assert found["threads"].value.startswith("8 in use, more than the 2 that have a core each: set OMP_NUM_THREADS=2")
    assert "idle threads spin" in found["waiting"].value
    assert (found["threads"].ok, found["waiting"].ok, found["cpu quota"].value) == (False, False, "none")
