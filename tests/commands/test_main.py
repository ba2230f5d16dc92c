"""The command line as a user meets it: files, sentences, exit codes, and nothing half-written."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vstar_engine.artifacts.files import write_aside
from vstar_engine.commands.main import build_parser, main
from vstar_engine.errors import OutputError

TINY = ["generate", "--model", "mini", "--frames", "4", "--size", "32x32", "--steps", "2"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("VSTAR_")]:
        monkeypatch.delenv(name)
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_generate_writes_mp4_gif_and_sheet_and_says_where(here, capsys):
    assert main([*TINY, "--states", "snow", "flowers", "--out", "a.mp4", "--gif", "--sheet"]) == 0
    assert names(here) == ["a.gif", "a.mp4", "a.png"]
    out = capsys.readouterr().out
    assert "wrote a.mp4, a.gif, a.png: 4 frames of 32x32" in out
    assert all(stage in out for stage in ("text", "denoise", "decode"))


def test_inspect_prints_a_command_that_makes_the_file_again(here, capsys):
    assert main([*TINY, 'snow\'s "end" 🚀', "--seed", "9", "--until", "50%", "--sigma", "0=2", "--no-batch-guidance"]) == 0
    capsys.readouterr()
    assert main(["inspect", "vstar.mp4"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[0] == "vstar-engine"
    assert main([*command[1:], "--out", "again.mp4"]) == 0
    assert (here / "again.mp4").read_bytes() == (here / "vstar.mp4").read_bytes()


def test_without_a_command_three_examples_are_printed_that_parse(here, capsys):
    assert main([]) == 0
    examples = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  vstar-engine ")]
    assert len(examples) == 3
    for example in examples:
        _, command, *words = shlex.split(example, comments=True)
        assert build_parser(command)[0].parse_args([command, *words]).command == command


def test_json_output(here, capsys):
    assert main([*TINY, "snow", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["files"] == ["vstar.mp4"]
    assert result["request"]["states"] == ["snow"]
    assert set(result["seconds"]) == {"text", "denoise", "decode"}


@pytest.mark.parametrize(
    ("content", "files"),
    [
        ('{"prompt": "p", "subprompts": ["a", "b"]}', ["vstar.mp4"]),
        ('[{"prompt": "p", "subprompts": ["a"]}, {"prompt": "q", "subprompts": ["b"]}]', ["vstar-001.mp4", "vstar-002.mp4"]),
        ("a\n\nb\n", ["vstar.mp4"]),
    ],
    ids=["object", "list", "lines"],
)
def test_synopsis_files(here, content, files):
    (here / "s").write_text(content)
    assert main([*TINY, "--synopsis", "s"]) == 0
    assert names(here) == sorted(["s", *files])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "holds no states"),
        ("[]", "empty list"),
        ('{"prompt": "p", ', "looks like JSON"),
        ('{"prompt": "p"}', "subprompts"),
        ('{"prompt": "p", "subprompts": []}', "has no subprompts"),
        ('["a"]', "subprompts"),
        ('{"prompt": "p", "subprompts": [1]}', "subprompts"),
    ],
)
def test_bad_synopsis_files(here, capsys, content, complaint):
    (here / "s").write_text(content)
    assert main([*TINY, "--synopsis", "s"]) == 2
    assert complaint in capsys.readouterr().err
    assert names(here) == ["s"]


BAD = [
    (["--model", "maxi", "x"], 2, "unknown model 'maxi'"),
    (["x", "--tar", "64D3"], 2, "unknown TAR preset '64D3'"),
    (["x", "--sigma", "3=1"], 2, "level 3 does not exist"),
    (["x", "--sigma", "0=0"], 2, "above 0, got 0.0"),
    (["x", "--sigma", "0=-2"], 2, "above 0, got -2.0"),
    (["x", "--sigma", "0"], 2, "LEVEL=VALUE"),
    (["x", "--frames", "0"], 2, "got 0"),
    (["x", "--frames", "-1"], 2, "got -1"),
    (["x", "--frames", "513"], 2, "got 513"),
    (["x", "--frames", "many"], 2, "a number of frames is whole, or inf, got 'many'"),
    (["x", "--size", "100x128"], 2, "multiples of 32"),
    (["x", "--size", "99999999x32"], 2, "multiples of 32"),
    (["x", "--size", "large"], 2, "HEIGHTxWIDTH"),
    (["x", "--steps", "0"], 2, "got 0"),
    (["x", "--steps", "1001"], 2, "got 1001"),
    (["x", "--guidance", "nan"], 2, "finite"),
    (["x", "--eta", "2"], 2, "eta must be 0 to 1"),
    (["x", "--strength", "inf"], 2, "finite"),
    (["x", "--fast", "fp8,"], 2, "step-cache, few-step, fp8, got ''"),
    (["x", "--until", "200%"], 2, "0% to 100%"),
    (["x", "--seed", "-5"], 2, "seed"),
    (["x", "--mode", "cubic"], 2, "mode must be one of"),
    (["x", "--backend", "magic"], 2, "unknown backend"),
    ([], 2, "exactly one of PROMPT, --states and --synopsis, got none"),
    (["x", "--synopsis", "nowhere"], 2, "exactly one"),
    (["--synopsis", "nowhere"], 2, "cannot read the synopsis"),
    (["--states", *"abcde"], 2, "5 states need at least 5 frames"),
    (["x", "--out", "a.avi"], 2, "ends in .mp4, .gif, .png"),
    (["x", "--riddle"], 2, "unrecognized arguments: --riddle"),
    (["x", "--weights", "nowhere"], 3, "nowhere; give a folder made by"),
    (["x", "--out", "no/a.mp4"], 4, "there is no folder"),
    (["x", "--frames", "512", "--size", "4096x4096"], 5, "GiB are free"),
    (["x", "--device", "warp"], 6, "unknown device"),
    (["x", "--device", "cuda:99"], 6, "no device cuda:99"),
    (["x", "--dtype", "int8"], 2, "dtype must be one of"),
]


@pytest.mark.parametrize(
    ("words", "code", "complaint"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_settings_get_a_sentence_and_a_code_and_leave_nothing(here, capsys, words, code, complaint):
    assert main([*TINY, *words]) == code
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert names(here) == []


@pytest.mark.parametrize(
    "prompt", ["snow " * 20_000, "a\0b", "lone \udcff byte", "🚀"], ids=["100 kB", "NUL", "surrogate", "emoji"]
)
def test_odd_prompts_make_videos(here, prompt):
    assert main([*TINY, "--states", prompt]) == 0
    assert main(["inspect", "vstar.mp4"]) == 0


def test_an_existing_file_is_kept_unless_forced(here, capsys):
    (here / "a.gif").write_text("mine")
    assert main([*TINY, "x", "--out", "a.mp4", "--gif"]) == 4
    assert "a.gif exists" in capsys.readouterr().err
    assert (here / "a.gif").read_text() == "mine"
    assert main([*TINY, "x", "--out", "a.mp4", "--gif", "--force"]) == 0
    assert (here / "a.gif").read_bytes().startswith(b"GIF8")


def test_a_file_replaces_no_folder(here, capsys):
    folder = here / "a.mp4"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    assert main([*TINY, "x", "--out", "a.mp4", "--force"]) == 4
    assert capsys.readouterr().err == "vstar-engine: cannot write a.mp4: it is a folder; give the name of a file\n"
    with pytest.raises(OutputError, match="Is a directory"), write_aside(folder) as aside:
        aside.write_text("a video")
    assert [path.name for path in here.iterdir()] == ["a.mp4"]
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_print_config_shows_what_is_in_force(here, capsys, monkeypatch):
    monkeypatch.setenv("VSTAR_STEPS", "3")
    assert main(["generate", "x", "--eta", "0.5", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "steps = 3\n" in printed
    assert "eta = 0.5\n" in printed


def test_missing_library(here, modules, capsys):
    modules({"xformers.ops": None})
    assert main([*TINY, "x", "--spatial-attention", "xformers"]) == 7
    assert "needs the xformers package" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "terminated"])
def test_interruption_leaves_nothing(here, number, code):
    command = [sys.executable, "-m", "vstar_engine", "generate", "x", "--model", "mini", "--steps", "900", "--size", "32x32"]
    child = subprocess.Popen(
        [*command, "-v"],
        cwd=here,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert child.stderr is not None
    for line in child.stderr:
        if "tensors used" in line:
            break
    time.sleep(0.5)
    child.send_signal(number)
    child.stderr.read()
    assert child.wait(20) == code
    assert names(here) == []


def test_doctor_names_what_is_here_and_what_is_missing(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out
    assert "cpu" in out
    assert main(["doctor", "--json"]) == 0
    facts = {fact["name"]: fact for fact in json.loads(capsys.readouterr().out)}
    assert facts["av"]["ok"] is True
    for backend in ("tensorrt", "tensorrt-rtx"):
        assert facts[backend]["ok"] or "install" in facts[backend]["value"]


def test_help_states_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "3 bad weights" in " ".join(capsys.readouterr().out.split())


ROOT = str(Path(__file__).parents[2])
