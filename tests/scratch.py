"""Wheels in a scratch folder, for tests alone: never part of the project or of its environment.

The CI sets VSTAR_WHEELS=1, and then a test that cannot have them fails instead of being skipped.
"""

import fcntl
import os
import shutil
import subprocess
import sys
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
    """Gives a folder with the wheels in it, installed once, without what they depend on; `lack` where they cannot be had."""
    folder = CACHE / f"{name}-py{PYTHON}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            aside = folder.with_suffix(".partial")
            shutil.rmtree(aside, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary", ":all:", "--target"]
            done = subprocess.run([*command, str(aside), *wheels], capture_output=True, text=True)
            if done.returncode:
                lack(f"needs the wheels {', '.join(wheels)}: {done.stderr.strip()[-200:]}")
            aside.rename(folder)
    return folder
