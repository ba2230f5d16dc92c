"""Commands of documents, as written but in few steps: the quickstart's, README's among them, run in order with the mini model.

`make`, clone and pip lines are checked for existence alone; lines marked gpu, checkpoint or minutes are parsed. A line that
ends in & runs in the background and is stopped at the end.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import psutil
import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from support.servers import free_port
from vstar_engine.commands.main import COMMANDS, build_parser

ROOT = Path(__file__).parents[2]
PYTHON = ".venv/bin/python"
MARKED = re.compile(r"#\s*(gpu|checkpoint|minutes)\b")
PAGES = sorted((ROOT / "docs").rglob("*.md"))
# smaller than the defaults, for whatever a line leaves open
LIGHT = {"VSTAR_STEPS": "2", "VSTAR_FRAMES": "8", "OMP_NUM_THREADS": "1"}
STEPS = re.compile(r"(--steps |\"num_inference_steps\": )\d+")


def commands(path: Path) -> list[str]:
    """Returns the commands of a document's `sh` blocks, each with its continued lines and its here-document."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
        lines = iter(block.splitlines())
        for line in lines:
            command = line
            while command.endswith("\\"):
                command = f"{command[:-1]}{next(lines)}"
            if ends := re.search(r"<<'(\w+)'", command):
                for more in lines:
                    command += f"\n{more}"
                    if more == ends[1]:
                        break
            if command.strip() and not command.startswith("#"):
                found.append(command)
    return found


def check_make(words: list[str]) -> None:
    """Finds the targets of a `make` line; make itself fails on one that is not there."""
    done = subprocess.run([*words, "--question", "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert "No rule" not in done.stderr, done.stderr


def check_pip(words: list[str]) -> None:
    """Finds the extras and files that a pip line names."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if word.startswith(".["):
            assert set(word[2:-1].split(",")) <= set(extras), word
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()


def check_parsed(words: list[str]) -> None:
    """Hands a line of ours to the real parser, which exits on what it does not know."""
    program = Path(words[0]).name
    if program == "vstar-engine":
        assert words[1] in COMMANDS, words
        parser, _ = build_parser(words[1])
        parser.parse_args(words[1:])
    else:
        assert program == "python"
        compile(words[words.index("-c") + 1], "a line", "exec")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like a clone: `.venv/bin` leads to the environment that the tests run in."""
    bin = tmp_path / ".venv" / "bin"
    bin.mkdir(parents=True)
    for name, module in (("python", ""), ("vstar-engine", " -m vstar_engine")):
        (bin / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{module} "$@"\n')
        (bin / name).chmod(0o755)
    return tmp_path


def checked(command: str) -> bool:
    """Checks a command that is not run here; returns whether it is one."""
    words = shlex.split(command.splitlines()[0], comments=True)
    if words[0] == "make":
        check_make(words)
    elif words[1:3] == ["-m", "pip"]:
        check_pip(words)
    elif MARKED.search(command):
        check_parsed(words)
    else:
        return words[:2] == ["git", "clone"]
    return True


def test_the_readmes_commands_are_those_of_the_quickstart() -> None:
    """Which the next test runs."""
    run = commands(ROOT / "docs/quickstart.md")
    ours = [command for command in commands(ROOT / "README.md") if not checked(command)]
    assert len(ours) >= 2
    assert [command for command in ours if command not in run] == []


def test_commands_of_the_quickstart_run(folder: Path) -> None:
    port = free_port()
    environment = {**os.environ, **LIGHT, "VSTAR_PORT": str(port), "VSTAR_SERVER": f"http://127.0.0.1:{port}"}
    started: list[subprocess.Popen[bytes]] = []
    ran = 0
    try:
        for command in commands(ROOT / "docs/quickstart.md"):
            if checked(command):
                continue
            if command.endswith("&"):
                log = (folder / "background.log").open("wb")
                started.append(
                    subprocess.Popen(["bash", "-c", f"exec {command[:-1]}"], cwd=folder, env=environment, stderr=log)
                )
            else:
                done = subprocess.run(
                    ["bash", "-c", STEPS.sub(r"\g<1>2", command).replace("127.0.0.1:8000", f"127.0.0.1:{port}")],
                    cwd=folder,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=300,
                )
                assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
                ran += 1
                for out in re.findall(r"--out (\S+\.mp4)|write_to_file\(\"(\S+\.mp4)\"\)", command):
                    assert (folder / "".join(out)).stat().st_size > 1000
    finally:
        for process in started:
            others = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            process.wait(60)
            for one in psutil.wait_procs(others, timeout=10)[1]:
                one.kill()
    assert ran >= 2


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT / "docs")))
def test_commands_of_pages_parse(path: Path) -> None:
    """Every `vstar-engine` line of a page is one that the parser takes."""
    for command in commands(path):
        for line in command.splitlines()[:1]:
            words = shlex.split(line, comments=True)
            if words and words[0] == "vstar-engine" and "..." not in words:
                check_parsed(words)


def test_the_python_of_the_readme_runs(folder: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    environment = {**os.environ, **LIGHT, "OMP_WAIT_POLICY": "passive"}
    subprocess.run([PYTHON, "-c", block], cwd=folder, env=environment, check=True)
    assert (folder / "spring.mp4").stat().st_size > 1000
