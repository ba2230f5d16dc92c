"""Wheels in a scratch folder, for tests alone: never part of the project or of its environment.

The CI sets VSTAR_WHEELS=1, and then a test that cannot have them fails instead of being skipped.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

PYTHON = f"{sys.version_info.major}{sys.version_info.minor}"
CACHE = Path(os.environ.get("VSTAR_TEST_CACHE", Path.home() / ".cache" / "vstar-engine-tests"))


def lack(reason: str) -> NoReturn:
    """Skips a test for what it lacks, or fails it where nothing may be skipped."""
    if os.environ.get("VSTAR_WHEELS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def installed(name: str, *wheels: str) -> Path:
    """Returns a folder with the wheels in it, installed once, without what they depend on; `lack` where they cannot be had."""
    return _made(name, wheels, lambda folder: _pip(sys.executable, "--no-deps", "--target", str(folder), *wheels))


def environment(name: str, *wheels: str) -> Path:
    """Returns the `bin` folder of a virtual environment with the wheels and what they depend on, made once; `lack` as above."""

    def make(folder: Path) -> "subprocess.CompletedProcess[str]":
        venv.create(folder, with_pip=True)
        return _pip(str(folder / "bin" / "python"), *wheels)

    return _made(name, wheels, make) / "bin"


def _pip(python: str, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary", ":all:", *words]
    return subprocess.run(command, capture_output=True, text=True)


def _made(name: str, wheels: tuple[str, ...], make: Callable[[Path], "subprocess.CompletedProcess[str]"]) -> Path:
    folder = CACHE / f"{name}-py{PYTHON}"
    whole = folder / "whole"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            done = make(folder)
            if done.returncode:
                lack(f"needs the wheels {', '.join(wheels)}: {done.stderr.strip()[-200:]}")
            whole.touch()
    return folder
