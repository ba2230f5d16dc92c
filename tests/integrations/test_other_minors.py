"""The dials' tests with every other minor version of diffusers that is said to be served, a process each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import scratch

pytest.importorskip("transformers", reason="needs transformers")

HERE = Path(__file__).parent
MINORS = ("0.36", "0.37", "0.38", "0.39", "0.40", "0.41")
FILES = ("test_unet_dial.py", "test_wan_dial.py", "test_timeline.py")


@pytest.mark.slow
@pytest.mark.parametrize("minor", MINORS)
def test_a_minor_version(minor):
    folder = scratch.installed(f"diffusers-{minor}", f"diffusers=={minor}.*")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / name) for name in FILES)]
    said = subprocess.run(
        [sys.executable, "-c", "import diffusers; print(diffusers.__version__)"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert said.stdout.startswith(minor), said.stderr[-2000:]
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
