"""B1: the OpenAPI document against the server; whatever it allows is answered as it says, and nothing makes a 500."""

import json
import os
import re
import subprocess
import sys

import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from support.servers import Server

if os.environ.get("VSTAR_SERVE") != "1":
    pytest.importorskip("schemathesis", reason="needs schemathesis: make test")

CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("use_after_free", "ensure_resource_availability"),
)
FORM = "multipart/form-data"


def json_alone(document):
    """Returns an OpenAPI document without its forms, whose values are all text: a number or null in one breaks no schema."""
    for path in document["paths"].values():
        for operation in path.values():
            operation.get("requestBody", {}).get("content", {}).pop(FORM, None)
    return document


@pytest.mark.parametrize(
    ("phases", "examples", "cases"),
    [
        ("fuzzing,stateful", 24, 250),
        pytest.param("examples,coverage,fuzzing,stateful", 60, 2000, marks=pytest.mark.reliability),
    ],
    ids=["short", "long"],
)
def test_schema_holds(tmp_path, phases, examples, cases):
    with Server(tmp_path, "--max-queue", "100000", slow={"step": 0.0}) as server:
        document = tmp_path / "openapi.json"
        document.write_text(json.dumps(json_alone(server.http.get("/openapi.json").json())))
        for told, checks in ((document, (*CHECKS, "negative_data_rejection")), (f"{server.url}/openapi.json", CHECKS)):
            words = [
                sys.executable,
                "-m",
                "schemathesis.cli",
                "run",
                str(told),
                "--url",
                server.url,
                "--seed",
                "1",
                "--no-color",
            ]
            words += ["--phases", phases, "--max-examples", str(examples), "--checks", ",".join(checks)]
            words += ["--continue-on-failure", "--request-timeout", "60", "--suppress-health-check", "all"]
            done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=3000)
            assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
            found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
            assert found is not None, done.stdout[-2000:]
            generated, passed = map(int, found.groups())
            print(f"{generated} cases, {passed} passed")
            assert generated == passed >= cases
        assert "Traceback" not in server.log()
        answered = re.findall(r'"status": (\d+)', server.log())
        assert answered
        assert not [status for status in answered if status >= "500"]
        server.cancel_all()
        server.ledger(within=300)
