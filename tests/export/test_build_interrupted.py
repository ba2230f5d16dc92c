"""Builds that are killed, that meet another build, or that find no room: an engine is whole or absent."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from support.fake_builder import SETTINGS, names
from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.errors import EngineError, OutputError
from vstar_engine.export import build_engine
from vstar_engine.export.builders import silent

KILLED = """
import os, pathlib, shutil, signal, sys
from vstar_engine.artifacts import files as artifacts
path, other, moment = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def deadly(function):
    def call(*given):
        result = function(*given)
        if result is not False:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

if moment == "exchanged":
    artifacts._exchanged = deadly(artifacts._exchanged)
elif moment == "moved away":
    artifacts._exchanged = lambda *given: False
    os.replace = deadly(os.replace)
elif moment == "moved in":
    artifacts._exchanged, shutil.rmtree = lambda *given: False, deadly(lambda *given: None)
with artifacts.write_aside(path, folder=True, private=True) as aside:
    shutil.copytree(other, aside, dirs_exist_ok=True)
    if moment == "written":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", ["e", "spring.engine", "e[1]"])
@pytest.mark.parametrize("moment", ["written", "exchanged", "moved away", "moved in"])
def test_a_killed_build_leaves_an_engine_and_what_the_next_one_clears(weights, builder, tmp_path, moment, name):
    """With a disk where names can change places there is an engine at every moment; on others the next build finds it."""
    folder, other = tmp_path / "engines" / name, tmp_path / "other"
    folder.parent.mkdir()
    for place in (folder, other):
        build_engine.build(SETTINGS, weights, place, report=silent)
    # of engines whose names begin alike, which stay
    neighbours = [f".{name}.more.77.before", f".{name}.more.77.partial.more"]
    for neighbour in neighbours:
        (folder.parent / neighbour).mkdir()
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(other), moment], capture_output=True, text=True)
    if moment == "exchanged" and done.returncode == 0:
        pytest.skip("names cannot change places on this disk")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(names(folder.parent)) > 2, "something is left"
    if moment != "moved away":
        BuiltEngine.open(folder)
    build_engine.build(SETTINGS, weights, folder, report=silent)
    assert builder.count == 2, "the engine was there"
    assert names(folder.parent) == sorted([*neighbours, name])
    BuiltEngine.open(folder)


def test_what_a_killed_build_left_is_no_engine_and_is_cleared(weights, builder, tmp_path):
    for name in ("e", "spring.engine"):
        (tmp_path / f".{name}.1.partial{Path(name).suffix}").mkdir()
        with pytest.raises(EngineError, match="no engine at"):
            BuiltEngine.open(tmp_path / name)
        build_engine.build(SETTINGS, weights, tmp_path / name, report=silent)
    assert names(tmp_path) == ["e", "spring.engine"]


@pytest.mark.parametrize("look", [1, 2])
def test_a_lock_that_another_build_removes_meanwhile_is_taken_anew(weights, builder, tmp_path, monkeypatch, look):
    looks, plain = [], Path.stat

    def stat(path, **given):
        if path.name == ".e.lock":
            looks.append(path)
            if len(looks) == look:
                path.unlink()
        return plain(path, **given)

    monkeypatch.setattr(Path, "stat", stat)
    build_engine.build(SETTINGS, weights, tmp_path / "e", report=silent)
    assert names(tmp_path) == ["e"]


def test_a_disk_that_is_too_full_is_said_before_the_work(weights, builder, tmp_path, free_disk):
    free_disk(2**20 - 1)
    with pytest.raises(OutputError, match=r"takes 1 MiB where .* has 0 MiB free"):
        build_engine.build(SETTINGS, weights, tmp_path / "e", report=silent)
    assert builder.count == 0
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_locked(weights, builder, tmp_path):
    (tmp_path / ".e.lock").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*\.e\.lock: Is a directory"):
        build_engine.build(SETTINGS, weights, tmp_path / "e", report=silent)


def test_a_folder_that_is_not_there(weights, builder, tmp_path):
    with pytest.raises(OutputError, match="there is no folder"):
        build_engine.build(SETTINGS, weights, tmp_path / "no" / "e", report=silent)


def test_two_builds_at_once_are_one(weights, builder, tmp_path):
    begun, waiting, heard = threading.Event(), threading.Event(), []
    plain = builder.build

    def slow(*args):
        begun.set()
        assert waiting.wait(30)
        return plain(*args)

    def report(line):
        heard.append(line)
        waiting.set()

    builder.build = slow
    first = threading.Thread(target=build_engine.build, args=(SETTINGS, weights, tmp_path / "e", False, silent))
    first.start()
    assert begun.wait(30)
    artifact = build_engine.build(SETTINGS, weights, tmp_path / "e", report=report)
    first.join()
    assert builder.count == 1
    assert heard == [f"another build of {tmp_path / 'e'} runs; waiting for it"]
    assert artifact.manifest["facts"] == {"nodes": 3}
    assert names(tmp_path) == ["e"]
