"""Building: folders that are private, whole or absent, locked, reused and replaced; with a builder that writes one file."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vstar_engine import Engine
from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.artifacts.manifest import write_manifest
from vstar_engine.commands.main import main
from vstar_engine.config.models import MODELS
from vstar_engine.errors import CheckpointError, EngineError, MissingLibrary, OutputError
from vstar_engine.export import build_engine
from vstar_engine.export.build_settings import Estimate, Settings
from vstar_engine.export.builders import alive, builder_named
from vstar_engine.export.commands.build import parse_frames
from vstar_engine.weights import checkpoint

SETTINGS = Settings(MODELS["mini"], "inductor", size=(32, 64))


@pytest.fixture
def weights(mini_weights):
    return checkpoint.Weights(mini_weights)


@pytest.fixture
def builder(monkeypatch):
    """Stands in for a back end's builder; `fault` is raised after the file is written."""
    made = types.SimpleNamespace(count=0, fault=None, options=lambda settings: {})
    made.estimate = lambda settings: Estimate(1.0, 2**20, 2**30, "one build")

    def build(settings, weights, folder, report):
        made.count += 1
        report("building")
        (folder / "unet.pt2").write_bytes(b"engine")
        if made.fault:
            raise made.fault
        return {"nodes": 3}

    made.build = build
    monkeypatch.setattr(build_engine, "builder_named", lambda name: made)
    monkeypatch.setattr("vstar_engine.export.commands.build.builder_named", lambda name: made)
    return made


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def silent(line):
    pass


def test_a_build_is_private_and_says_what_made_it(weights, builder, tmp_path):
    artifact = build_engine.build(SETTINGS, weights, tmp_path / "e", report=silent)
    assert names(tmp_path) == ["e"]
    assert stat.S_IMODE((tmp_path / "e").stat().st_mode) == 0o700
    assert artifact.manifest["facts"] == {"nodes": 3}
    assert artifact.identity["weights"] == weights.fingerprint()
    assert artifact.manifest["weights_path"] is None  # the mini model's own
    assert artifact.manifest["made_by"]["torch"] == torch.__version__


def test_the_peak_is_that_of_the_largest_process(weights, builder, tmp_path, monkeypatch):
    peaks = {resource.RUSAGE_SELF: 3, resource.RUSAGE_CHILDREN: 5}
    monkeypatch.setattr(resource, "getrusage", lambda who: types.SimpleNamespace(ru_maxrss=peaks[who]))
    assert build_engine.build(SETTINGS, weights, tmp_path / "e", report=silent).manifest["peak_memory"] == 5 * 1024


def test_without_a_folder_it_goes_among_the_engines_under_its_name(weights, builder, tmp_path, monkeypatch):
    monkeypatch.setenv("VSTAR_ENGINES", str(tmp_path / "deep" / "engines"))
    artifact = build_engine.build(SETTINGS, weights, report=silent)
    assert artifact.folder == tmp_path / "deep" / "engines" / artifact.name
    for made in (artifact.folder.parent, tmp_path / "deep"):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert BuiltEngine.open(artifact.name).manifest == artifact.manifest


def test_what_is_there_already_is_not_built_again(weights, builder, tmp_path):
    for _ in range(2):
        build_engine.build(SETTINGS, weights, tmp_path / "e", report=silent)
    assert builder.count == 1
    build_engine.build(SETTINGS, weights, tmp_path / "e", force=True, report=silent)
    assert builder.count == 2


def test_another_engine_is_replaced_only_by_force(weights, builder, tmp_path):
    build_engine.build(SETTINGS, weights, tmp_path / "e", report=silent)
    other = Settings(MODELS["mini"], "inductor", size=(32, 32))
    with pytest.raises(OutputError, match="holds another engine, mini-inductor-float32-fany-32x64"):
        build_engine.build(other, weights, tmp_path / "e", report=silent)
    assert build_engine.build(other, weights, tmp_path / "e", force=True, report=silent).identity["size"] == [32, 32]


def holiday(path):
    path.mkdir()
    (path / "holiday.jpg").write_bytes(b"beach")


def other_manifest(path):
    holiday(path)
    (path / "manifest.json").write_text('{"kind": "vstar-engine weights"}')


def link(path):
    holiday(path.with_name("photos"))
    path.symlink_to(path.with_name("photos"))


NO_ENGINES = {
    "photos": (holiday, "is no engine: it is no folder with a manifest.json; it is left as it is"),
    "weights": (other_manifest, "is no engine: its manifest.json describes something else"),
    "file": (lambda path: path.write_bytes(b"beach"), "is no engine"),
    "link": (link, "is a link to .*photos; give that folder as --out"),
}


@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
@pytest.mark.parametrize("kind", NO_ENGINES)
def test_what_is_no_engine_is_refused_before_the_work_and_kept(weights, builder, tmp_path, kind, force):
    make, complaint = NO_ENGINES[kind]
    make(tmp_path / "e")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(OutputError, match=complaint) as caught:
        build_engine.build(SETTINGS, weights, tmp_path / "e", force=force, report=silent)
    assert "--force" not in str(caught.value)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
    assert builder.count == 0


def test_an_empty_folder_is_taken_by_force(weights, builder, tmp_path):
    (tmp_path / "e").mkdir()
    with pytest.raises(OutputError, match=r"is taken: .*--force"):
        build_engine.build(SETTINGS, weights, tmp_path / "e", report=silent)
    build_engine.build(SETTINGS, weights, tmp_path / "e", force=True, report=silent)


def test_a_damaged_engine_is_not_taken_for_a_built_one(weights, builder, tmp_path):
    build_engine.build(SETTINGS, weights, tmp_path / "e", report=silent)
    (tmp_path / "e" / "unet.pt2").write_bytes(b"change")
    with pytest.raises(OutputError, match=r"was altered.*--force"):
        build_engine.build(SETTINGS, weights, tmp_path / "e", report=silent)
    build_engine.build(SETTINGS, weights, tmp_path / "e", force=True, report=silent)


def test_a_folder_of_engines_that_cannot_be_written(weights, builder, tmp_path, monkeypatch):
    plain = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: plain(path, mode) and path != tmp_path)
    with pytest.raises(OutputError, match=f"cannot write .*e: the folder {tmp_path} is not writable"):
        build_engine.build(SETTINGS, weights, tmp_path / "e", report=silent)
    assert (builder.count, names(tmp_path)) == (0, [])


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("the compiler died"), RuntimeError),
    ],
    ids=["disk full", "interrupted", "failed"],
)
def test_a_build_that_fails_leaves_nothing(weights, builder, tmp_path, fault, error):
    builder.fault = fault
    with pytest.raises(error):
        build_engine.build(SETTINGS, weights, tmp_path / "e", report=silent)
    assert names(tmp_path) == []


def test_a_failed_rebuild_leaves_the_engine_that_was_there(weights, builder, tmp_path):
    before = build_engine.build(SETTINGS, weights, tmp_path / "e", report=silent)
    builder.fault = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OutputError, match="No space left"):
        build_engine.build(SETTINGS, weights, tmp_path / "e", force=True, report=silent)
    assert BuiltEngine.open(tmp_path / "e").manifest == before.manifest


# replaces the folder of an engine by another and is killed on the way
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


def test_a_disk_that_is_too_full_is_said_before_the_work(weights, builder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=2**20 - 1))
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
    begun, waiting, lines = threading.Event(), threading.Event(), []
    plain = builder.build

    def slow(*args):
        begun.set()
        assert waiting.wait(30)
        return plain(*args)

    def report(line):
        lines.append(line)
        waiting.set()

    builder.build = slow
    first = threading.Thread(target=build_engine.build, args=(SETTINGS, weights, tmp_path / "e", False, silent))
    first.start()
    assert begun.wait(30)
    artifact = build_engine.build(SETTINGS, weights, tmp_path / "e", report=report)
    first.join()
    assert builder.count == 1
    assert lines == [f"another build of {tmp_path / 'e'} runs; waiting for it"]
    assert artifact.manifest["facts"] == {"nodes": 3}
    assert names(tmp_path) == ["e"]


def test_a_long_step_says_that_it_goes_on():
    lines, twice = [], threading.Event()

    def report(line):
        lines.append(line)
        if len(lines) == 3:
            twice.set()

    with alive(report, "compiling the unet", patience=0.01):
        assert twice.wait(30)
    silent_since = len(lines)
    with pytest.raises(OSError, match="full"), alive(lines.append, "tracing", patience=60):
        raise OSError("full")
    assert lines[0] == "compiling the unet"
    assert re.fullmatch(r"compiling the unet: \d+ s so far", lines[1])
    assert lines[silent_since:] == ["tracing"], "nothing is said of a step that is over"


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"backend": "magic"}, "unknown backend 'magic'"),
        ({"backend": "eager"}, "nothing to build"),
        ({"frames": (0, 16)}, "frames must be 1 to 512, got 0"),
        ({"frames": (16, 513)}, "got 513"),
        ({"frames": (32, 16)}, "must ascend"),
        ({"size": (33, 64)}, "multiples of 32"),
        ({"batch": 9}, "batch must be 1 to 8, got 9"),
        ({"opset": 18}, "--opset is for backend onnxruntime and tensorrt and tensorrt-rtx; inductor has no use for it"),
        ({"backend": "onnxruntime", "plugin": "aot"}, "--plugin is for backend tensorrt and tensorrt-rtx; onnxruntime has"),
        ({"refit": "yes"}, "--refit is for backend tensorrt; inductor has no use"),
        ({"timing_cache": Path("t")}, "--timing-cache is for backend tensorrt;"),
        ({"workspace": 1}, "--workspace is for backend tensorrt and"),
        ({"backend": "tensorrt-rtx", "compatibility": "ampere"}, "--compatibility is for backend tensorrt; tensorrt-rtx has"),
        ({"backend": "tensorrt-rtx", "refit": "yes"}, "--refit is for backend tensorrt; tensorrt-rtx has"),
        ({"backend": "tensorrt", "targets": ("SM80",)}, "--targets is for backend tensorrt-rtx; tensorrt has"),
        ({"backend": "tensorrt", "refit": "maybe"}, "refit must be one of no, yes, stripped, got 'maybe'"),
        ({"backend": "tensorrt", "compatibility": "all"}, "compatibility must be one of exact, capability, ampere, got 'all'"),
        ({"backend": "tensorrt", "level": 6}, "level must be one of 0, 1, 2, 3, 4, 5, got 6"),
        ({"backend": "tensorrt", "workspace": 0}, "workspace must be 1 MiB or more, got 0"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(changed, complaint):
    with pytest.raises(ValueError, match=complaint):
        Settings(**{"spec": MODELS["mini"], "backend": "inductor", **changed})


def test_weights_that_changed_after_the_build(builder, mini_weights, tmp_path):
    folder = shutil.copytree(mini_weights, tmp_path / "w")
    artifact = build_engine.build(SETTINGS, checkpoint.Weights(folder), tmp_path / "e", report=silent)
    assert artifact.manifest["weights_path"] == str(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).add_(1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="was altered"):
        Engine.load(engine=artifact)
    for name in ("manifest.json", "MODEL_CARD.md"):
        (folder / name).unlink()
    write_manifest(folder, {name: value for name, value in manifest.items() if name not in ("files", "sha256")})
    with pytest.raises(EngineError, match=f"built for weights .*, not .*; rebuild it: .*--weights {folder} .*--force"):
        Engine.load(engine=artifact)


def test_frames_are_read_as_a_list():
    assert parse_frames("32,16,32") == (16, 32)
    assert parse_frames("any") == ()
    with pytest.raises(ValueError, match="16,32,64"):
        parse_frames("many")


def test_a_back_end_whose_exporter_is_not_installed(monkeypatch):
    def absent(*args):
        raise ModuleNotFoundError("No module named 'onnx'", name="onnx")

    monkeypatch.setattr("vstar_engine.export.builders.import_module", absent)
    with pytest.raises(MissingLibrary, match=r"needs the onnx package; .*pip install onnx"):
        builder_named("onnxruntime")


WORDS = ["build", "--model", "mini", "--backend", "inductor", "--size", "32x64"]


def test_the_command_builds_and_prints_what_it_made(builder, tmp_path, capsys):
    assert main([*WORDS, "--frames", "16,32", "--out", str(tmp_path / "e")]) == 0
    printed = capsys.readouterr()
    assert f"generate --engine {tmp_path / 'e'}" in printed.out
    assert "building" in printed.err
    assert main([*WORDS, "--frames", "16,32", "--out", str(tmp_path / "e"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identity"]["frames"] == [16, 32]


def test_a_dry_run_prints_the_plan_and_builds_nothing(builder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VSTAR_ENGINES", str(tmp_path))
    assert main([*WORDS, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["folder"].startswith(str(tmp_path / "mini-inductor-float32-fany-32x64-"))
    assert (plan["frames"], plan["size"], plan["batch"]) == ("1 to 512", "32x64", "1 to 8")
    assert (plan["seconds"], plan["disk_mib"], plan["memory_mib"]) == (1, 1, 1024)
    assert main([*WORDS, "--dry-run"]) == 0
    assert "basis          one build\nseconds, disk and memory are rough guesses from the basis; nothing was built" in (
        capsys.readouterr().out
    )
    assert builder.count == 0
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["--backend", "magic"], 2, "unknown backend"),
        (["--backend", "inductor", "--frames", "x"], 2, "16,32,64"),
        (["--backend", "inductor", "--size", "33x64"], 2, "multiples of 32"),
        (["--backend", "inductor", "--dtype", "int8"], 2, "dtype must be"),
        (["--backend", "inductor", "--device", "warp"], 6, "unknown device"),
        (["--backend", "inductor", "--weights", "none"], 3, "no weights at "),
        (["--backend", "inductor", "--out", "no/e"], 4, "there is no folder"),
        (["--backend", "inductor", "--compatibility", "ampere"], 2, "--compatibility is for backend tensorrt; inductor"),
        (["--backend", "tensorrt", "--level", "9"], 2, "invalid choice: 9"),
        (["--backend", "tensorrt-rtx", "--frames", "any"], 2, "tunes for lengths: name them, such as --frames 16,32, got any"),
    ],
    ids=str,
)
def test_bad_builds_are_one_sentence(builder, words, code, complaint, capsys):
    assert main(["build", "--model", "mini", *words]) == code
    assert complaint in capsys.readouterr().err
    assert builder.count == 0
