"""The command line where Python, the terminal or the user is set up in another way."""

import os
import subprocess
import sys
import threading

import pytest

from vstar_engine.artifacts.built_engine import engines_root
from vstar_engine.artifacts.files import user_cache
from vstar_engine.commands.installation import _library
from vstar_engine.commands.main import main
from vstar_engine.commands.prompt_options import cache_folder
from vstar_engine.errors import EngineError


def run(*words, shell="", **environment):
    command = [sys.executable, "-m", "vstar_engine", *words]
    if shell:
        command = ["bash", "-c", f'set -o pipefail; "$@" {shell}', "-", *command]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, timeout=120)


def test_without_docstrings():
    assert run("--help", PYTHONOPTIMIZE="2").returncode == 0


def test_a_letter_that_the_terminal_lacks_is_spelled_out():
    done = run("synopsis", "雪 -> 花", "--no-synopsis", PYTHONIOENCODING="latin-1")
    assert (done.returncode, rb"\u96ea" in done.stdout) == (0, True)


@pytest.mark.parametrize(("shell", "code", "said"), [("| true", 141, b""), (">/dev/full", 4, b"No space left")])
def test_output_that_nobody_takes(tmp_path, shell, code, said):
    (tmp_path / "many.txt").write_text("".join(f"day to night {i}\n" for i in range(2000)))
    done = run("synopsis", "--prompts", str(tmp_path / "many.txt"), "--no-synopsis", shell=shell)
    assert done.returncode == code
    assert said in done.stderr
    assert b"Traceback" not in done.stderr


def test_main_on_another_thread(capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["synopsis", "snow", "--no-synopsis"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    for name in ("XDG_CACHE_HOME", "VSTAR_CACHE", "VSTAR_ENGINES"):
        monkeypatch.delenv(name, raising=False)
    assert user_cache() is None
    assert cache_folder() is None
    with pytest.raises(EngineError, match="no home directory to keep engines in; set VSTAR_ENGINES"):
        engines_root()
    monkeypatch.setenv("VSTAR_ENGINES", "engines")
    monkeypatch.setenv("VSTAR_CACHE", "cache")
    assert (str(engines_root()), str(cache_folder())) == ("engines", "cache")


@pytest.mark.parametrize("error", ["OSError('libcudart.so.12')", "AttributeError('_ARRAY_API')", "RuntimeError('no driver')"])
def test_a_broken_library_is_a_line_of_doctor(tmp_path, monkeypatch, error):
    (tmp_path / "a_broken_library.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    fact = _library("a_broken_library", "this test")
    assert fact.ok is False
    assert fact.value.startswith("broken (")
