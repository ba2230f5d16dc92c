"""The unmodified `openai` clients: one that sends JSON, one that sends bracketed forms."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from support.servers import HERE, Server

# `make openai-clients` puts one there; the newest comes with the dev extra
OLDER = Path(os.environ.get("VSTAR_OPENAI_OLDER", HERE.parents[1] / "build" / "openai-2.24.0"))


@pytest.mark.parametrize("version", ["2.24.0", "3.51.0"])
def test_openai_client(version, tmp_path):
    path = [str(HERE.parent)]
    if version == "2.24.0":
        if not OLDER.is_dir() and os.environ.get("VSTAR_SERVE") != "1":
            pytest.skip("needs `make openai-clients`")
        path.insert(0, str(OLDER))
    with Server(tmp_path) as server:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        done = subprocess.run(
            [sys.executable, str(HERE / "openai_conformance.py"), server.url],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        server.ledger()
    assert done.stdout.split() == [version]
