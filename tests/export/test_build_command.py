"""The `build` command: what it prints, how it reports a long step, and the settings that it refuses."""

import json
import re
import threading
from pathlib import Path

import pytest

from support.fake_builder import names
from vstar_engine.commands.main import main
from vstar_engine.config.models import MODELS
from vstar_engine.errors import MissingLibrary
from vstar_engine.export.build_settings import Settings
from vstar_engine.export.builders import alive, builder_named
from vstar_engine.export.commands.build import parse_frames


def test_a_long_step_says_that_it_goes_on():
    heard, twice = [], threading.Event()

    def report(line):
        heard.append(line)
        if len(heard) == 3:
            twice.set()

    with alive(report, "compiling the unet", patience=0.01):
        assert twice.wait(30)
    silent_since = len(heard)
    with pytest.raises(OSError, match="full"), alive(heard.append, "tracing", patience=60):
        raise OSError("full")
    assert heard[0] == "compiling the unet"
    assert re.fullmatch(r"compiling the unet: \d+ s so far", heard[1])
    assert heard[silent_since:] == ["tracing"], "nothing is said of a step that is over"


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
