"""Commands of documents, as written but for smaller numbers: those of README and the quickstart run in order, with `mini`.

The quickstart's that are README's too run once. `make`, clone and pip lines are checked for existence alone; lines marked gpu,
checkpoint or minutes are parsed. A line that ends in & runs in the background and is stopped at the end.
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
SMALLER = {
    "--frames 16 --steps 10": "--frames 4 --steps 2",
    '"num_frames": 16, "num_inference_steps": 10': '"num_frames": 4, "num_inference_steps": 2',
    "frames=16": "frames=4",
}
# smaller than the defaults, for whatever a line leaves open
LIGHT = {"VSTAR_STEPS": "2", "VSTAR_FRAMES": "8", "OMP_NUM_THREADS": "1"}


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


def smaller(text: str) -> str:
    """Returns commands or code for videos of fewer frames and steps."""
    for written, light in SMALLER.items():
        text = text.replace(written, light)
    return text


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


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_commands_run_as_written(name: str, folder: Path) -> None:
    port = free_port()
    environment = {**os.environ, **LIGHT, "VSTAR_PORT": str(port), "VSTAR_SERVER": f"http://127.0.0.1:{port}"}
    started: list[subprocess.Popen[bytes]] = []
    ran = 0
    elsewhere = [] if name == "README.md" else commands(ROOT / "README.md")
    try:
        for command in map(smaller, commands(ROOT / name)):
            words = shlex.split(command.splitlines()[0], comments=True)
            if words[0] == "make":
                check_make(words)
            elif words[:2] == ["git", "clone"]:
                continue
            elif words[1:3] == ["-m", "pip"]:
                check_pip(words)
            elif command in elsewhere or MARKED.search(command):
                check_parsed(words)
            elif command.endswith("&"):
                log = (folder / "background.log").open("wb")
                started.append(
                    subprocess.Popen(["bash", "-c", f"exec {command[:-1]}"], cwd=folder, env=environment, stderr=log)
                )
            else:
                done = subprocess.run(
                    ["bash", "-c", command.replace("127.0.0.1:8000", f"127.0.0.1:{port}")],
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
    subprocess.run([PYTHON, "-c", smaller(block)], cwd=folder, env=environment, check=True)
    assert (folder / "spring.mp4").stat().st_size > 1000
