"""Building: folders that are private, whole or absent, reused and replaced; with a builder that writes one file."""

import errno
import json
import os
import resource
import shutil
import stat
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.fake_builder import SETTINGS, names
from vstar_engine import Engine
from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.artifacts.manifest import write_manifest
from vstar_engine.config.models import MODELS
from vstar_engine.errors import CheckpointError, EngineError, OutputError
from vstar_engine.export import build_engine
from vstar_engine.export.build_settings import Settings
from vstar_engine.export.builders import silent
from vstar_engine.weights import checkpoint


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
