"""B2: whatever is in a form, a configuration, a manifest or a safetensors header, it is read or refused by its own error."""

import asyncio
import contextlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

import support.serve_packages  # noqa: F401 - skips where they are missing
from support.engines import engine_at, identity
from vstar_engine.artifacts.built_engine import CALLED, BuiltEngine
from vstar_engine.artifacts.files import digest_of
from vstar_engine.artifacts.manifest import MANIFEST
from vstar_engine.commands.engines import _row
from vstar_engine.commands.main import build_parser
from vstar_engine.commands.option_sources import layered
from vstar_engine.errors import CheckpointError, EngineError
from vstar_engine.serving.errors import ApiError
from vstar_engine.serving.http.request_body import read_body
from vstar_engine.weights.checkpoint import Weights

COUNTS = pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.reliability)])
TEXT = st.text(max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def try_all(count, strategy, check):
    """Hands `check` so many examples, the same at every run."""
    quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=count, derandomize=True, **quiet)(given(strategy)(check))()


@st.composite
def changed(draw, whole):
    """Returns bytes with a few places overwritten, taken out or put in."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(content))), draw(st.integers(0, 8))
        content[at : at + length] = draw(st.binary(max_size=8))
    return bytes(content)


FORM = (
    b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na tree\r\n'
    b'--x\r\nContent-Disposition: form-data; name="synopsis[]"\r\n\r\nsnow\r\n'
    b'--x\r\nContent-Disposition: form-data; name="tar[sigma][0]"; filename="a"\r\nContent-Type: text/plain\r\n\r\n1\r\n'
    b"--x--\r\n"
)


@COUNTS
def test_any_form(count):
    kinds = st.sampled_from([b"multipart/form-data; boundary=x", b"application/x-www-form-urlencoded", b"application/json"])

    def check(example):
        body, kind = example
        # within an application Starlette answers for forms that it cannot read
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", kind)], "app": None}

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        with contextlib.suppress(ApiError):
            content, _ = asyncio.run(read_body(Request(scope, receive)))
            assert isinstance(content, dict)

    try_all(count, st.tuples(changed(FORM) | st.binary(max_size=60), kinds), check)


CONFIG = b'model = "mini"\nport = 8000\nwarm = ["16x320x512"]\nkeep-hours = 1.5\ninsecure = false\nlog_level = "info"\n'


@COUNTS
def test_any_configuration(count, tmp_path):
    parser, path = build_parser()[1]["serve"], tmp_path / "config.toml"
    defaults = dict(parser._defaults)

    def check(content):
        path.write_bytes(content)
        kept = {action: action.default for action in parser._actions}
        try:
            with contextlib.suppress(ValueError):
                layered(parser, ["--config", str(path)], {})
        finally:
            parser._defaults = dict(defaults)
            for action, default in kept.items():
                action.default = default

    try_all(count, changed(CONFIG) | st.binary(max_size=60), check)


@st.composite
def altered(draw, whole):
    """Returns a JSON object, some of whose values, at any depth, are others."""
    content = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        at, key = content, draw(st.sampled_from(sorted(content)))
        while isinstance(at[key], dict | list) and at[key] and draw(st.booleans()):
            at = at[key]
            key = draw(st.integers(0, len(at) - 1) if isinstance(at, list) else st.sampled_from(sorted(at)))
        at[key] = draw(VALUES)
    return content


def use(artifact, here):
    """Asks of an engine what the commands do: to be listed, to run a clip here, to be built again or for more frames."""
    row = _row(artifact)
    assert row["folder"] == str(artifact.folder)
    assert artifact.command().startswith("vstar-engine build --backend ")
    assert artifact.file("unet.pt2").is_file()
    for wanted in ({"frames": 512, "size": (32, 64), "rows": 2}, {"frames": 1, "size": (8, 8), "rows": 1}):
        with contextlib.suppress(EngineError):
            artifact.check_clip(**wanted)
    artifact.check(**here)


@COUNTS
def test_any_manifest(count, tmp_path):
    """With the sha256 that it states of itself, so that what is behind that is reached."""
    folder, here = engine_at(tmp_path / "engine"), {name: identity()[name] for name in (*CALLED, "versions")}
    whole = {name: value for name, value in json.loads((folder / MANIFEST).read_text()).items() if name != "sha256"}

    def check(content):
        with contextlib.suppress(ValueError):  # a number that JSON has no word for
            content = {**content, "sha256": digest_of(content)}
        (folder / MANIFEST).write_text(json.dumps(content))
        with contextlib.suppress(EngineError):
            use(BuiltEngine.open(folder), here)

    try_all(count, altered(whole) | st.dictionaries(TEXT, VALUES, max_size=3), check)


@COUNTS
def test_any_manifest_that_is_no_json(count, tmp_path):
    folder = engine_at(tmp_path / "engine")
    whole = (folder / MANIFEST).read_bytes()

    def check(content):
        (folder / MANIFEST).write_bytes(content)
        with contextlib.suppress(EngineError):
            BuiltEngine.open(folder)

    try_all(count, changed(whole) | st.binary(max_size=60) | st.just(b"[" * 100_000), check)


HEADER = json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"b": "c"}}).encode()


@COUNTS
def test_any_header_of_safetensors(count, tmp_path):
    path = tmp_path / "model.safetensors"

    def check(example):
        header, length, data = example
        path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + b"\0" * data)
        with contextlib.suppress(CheckpointError):
            weights = Weights(path)
            assert all(weights[name].numel() >= 0 for name in weights)

    lengths = st.none() | st.integers(0, 2**64 - 1)
    try_all(count, st.tuples(changed(HEADER) | st.binary(max_size=40), lengths, st.sampled_from([0, 23, 24, 25])), check)
