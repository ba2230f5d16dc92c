"""B3: bodies and paths that a running server refuses, each with a status, a code and what was wrong."""

import gzip
import json
import time

import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from support.servers import Server, error_of


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server
        server.ledger([video["id"] for video in server.every()])


# name: what is sent (content, headers), the answer's status and code
JSON = {"content-type": "application/json"}
BAD = {
    "empty": (b"", JSON, 400, "invalid_body"),
    "not-json": (b"{prompt: 1}", JSON, 400, "invalid_body"),
    "a-list": (b'["a"]', JSON, 400, "invalid_body"),
    "not-utf8": (b'{"prompt": "\xff"}', JSON, 400, "invalid_body"),
    "nul": (b'{"prompt": "a\\u0000b"}', JSON, 400, "invalid_value"),
    "half-surrogate": (b'{"prompt": "\\ud800"}', JSON, 400, "invalid_body"),
    "half-surrogate-name": (b'{"prompt": "a", "metadata": {"\\udfff": "a"}}', JSON, 400, "invalid_body"),
    "long-prompt": (json.dumps({"prompt": "a" * 2001}).encode(), JSON, 400, "invalid_value"),
    "ten-megabytes": (json.dumps({"prompt": "a" * 10_000_000}).encode(), JSON, 413, "body_too_large"),
    "deep": (b'{"metadata": ' + b"[" * 120 + b"]" * 120 + b"}", JSON, 400, "invalid_body"),
    "very-deep": (b"[" * 100_000, JSON, 400, "invalid_body"),
    "nan": (b'{"prompt": "a", "guidance_scale": NaN}', JSON, 400, "invalid_body"),
    "infinite": (b'{"prompt": "a", "guidance_scale": 1e309}', JSON, 400, "invalid_body"),
    "huge-number": (b'{"prompt": "a", "seed": 9223372036854775808}', JSON, 400, "invalid_value"),
    "endless-number": (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", JSON, 400, "invalid_body"),
    "repeated-name": (b'{"prompt": "a", "prompt": "b"}', JSON, 400, "invalid_body"),
    "word-as-number": (b'{"prompt": "a", "num_frames": "eight"}', JSON, 400, "invalid_value"),
    "unknown": (b'{"prompt": "a", "output_path": "../../x"}', JSON, 400, "unknown_field"),
    "two-videos": (b'{"prompt": "a", "n": 2}', JSON, 400, "invalid_value"),
    "true-videos": (b'{"prompt": "a", "n": true}', JSON, 400, "invalid_value"),
    "blank-prompt": (b'{"prompt": " \\n "}', JSON, 400, "invalid_value"),
    "blank-state": (b'{"synopsis": ["a", " "]}', JSON, 400, "invalid_value"),
    "blank-text": (b'{"synopsis": [{"text": " "}]}', JSON, 400, "invalid_value"),
    "no-prompt": (b'{"seed": 1}', JSON, 400, "invalid_value"),
    "empty-synopsis": (b'{"prompt": "a", "synopsis": []}', JSON, 400, "invalid_value"),
    "both-names": (b'{"prompt": "a", "synopsis": ["a"], "subprompts": ["a"]}', JSON, 400, "invalid_value"),
    "states-without-frames": (b'{"synopsis": ["a", "b"], "num_frames": 1}', JSON, 400, "invalid_value"),
    "places-out-of-order": (b'{"synopsis": [{"text": "a", "at": 9}, {"text": "b", "at": 1}]}', JSON, 400, "invalid_value"),
    "half-placed": (b'{"synopsis": [{"text": "a", "at": 0}, {"text": "b"}]}', JSON, 400, "invalid_value"),
    "odd-size": (b'{"prompt": "a", "size": "100x100"}', JSON, 400, "invalid_value"),
    "no-size": (b'{"prompt": "a", "size": "big"}', JSON, 400, "invalid_value"),
    "no-preset": (b'{"prompt": "a", "tar": "64D999"}', JSON, 400, "invalid_value"),
    "no-level": (b'{"prompt": "a", "tar": {"sigma": {"7": 1}}}', JSON, 400, "invalid_value"),
    "sigma-zero": (b'{"prompt": "a", "tar": {"sigma": {"0": 0}}}', JSON, 400, "invalid_value"),
    "budget": (b'{"prompt": "a", "num_frames": 512, "size": "4096x4096", "num_inference_steps": 200}', JSON, 400, "too_large"),
    "steps": (b'{"prompt": "a", "num_inference_steps": 900}', JSON, 400, "too_large"),
    "bundle-path": (b'{"embeddings": "../../etc/passwd"}', JSON, 400, "invalid_value"),
    "no-bundle": (b'{"embeddings": "none"}', JSON, 400, "embeddings_not_found"),
    "image-url": (b'{"prompt": "a", "input_reference": {"image_url": "http://169.254.169.254/"}}', JSON, 400, "unsupported"),
    "file-url": (b'{"prompt": "a", "input_reference": {"image_url": "file:///etc/passwd"}}', JSON, 400, "unsupported"),
    "gzip": (gzip.compress(b" " * 10_000_000), {**JSON, "content-encoding": "gzip"}, 415, "unsupported_encoding"),
    "xml": (b"<prompt/>", {"content-type": "text/xml"}, 415, "unsupported_media_type"),
    "no-boundary": (b"abc", {"content-type": "multipart/form-data"}, 400, "invalid_body"),
    "broken-form": (b"--x\r\nabc", {"content-type": "multipart/form-data; boundary=x"}, 400, None),
    "mixed-form": (b"synopsis=a&synopsis[]=b", {"content-type": "application/x-www-form-urlencoded"}, 400, "invalid_body"),
    "bad-brackets": (b"tar[sigma=1", {"content-type": "application/x-www-form-urlencoded"}, 400, "invalid_body"),
    "deep-form": (b"a" + b"[b]" * 99 + b"=1", {"content-type": "application/x-www-form-urlencoded"}, 400, "invalid_body"),
    "broken-host": (b'{"prompt": "a"}', {**JSON, "host": "[::1"}, 403, "forbidden_host"),
    "broken-origin": (b'{"prompt": "a"}', {**JSON, "origin": "http://["}, 403, "forbidden_origin"),
    "long-key": (b'{"prompt": "a"}', {**JSON, "idempotency-key": "k" * 201}, 400, "invalid_value"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies_are_refused(server, name):
    content, headers, status, code = BAD[name]
    before = len(server.every())
    begun = time.monotonic()
    error_of(server.http.post("/v1/videos", content=content, headers=headers), status, code)
    assert time.monotonic() - begun < 2.0
    assert len(server.every()) == before


def test_a_body_without_length_is_counted(server):
    chunks = (b" " * 65536 for _ in range(64))
    error_of(server.http.post("/v1/videos", content=chunks, headers=JSON), 413, "body_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/videos/../../etc/passwd", 404, None),
        ("GET", "/v1/videos/..%2f..%2fetc%2fpasswd", 404, None),
        ("GET", "/v1/videos/video_00000000000000000000000000000000", 404, "video_not_found"),
        ("GET", "/v1/videos/%00", 404, "video_not_found"),
        ("DELETE", "/v1/videos/nonsense", 404, "video_not_found"),
        ("GET", "/v1/videos?limit=0", 400, "invalid_value"),
        ("GET", "/v1/videos?limit=99999999999999999999", 400, "invalid_value"),
        ("GET", "/v1/videos?order=up", 400, "invalid_value"),
        ("GET", "/v1/videos?after=video_00000000000000000000000000000000", 404, "video_not_found"),
        ("GET", "/v1/videos/nonsense/content?variant=secret", 400, "invalid_value"),
        ("PUT", "/v1/videos", 405, "method_not_allowed"),
        ("GET", "/nonsense", 404, "not_found"),
        ("POST", "/v1/videos/edits", 400, "unsupported"),
        ("POST", "/v1/videos/extensions", 400, "unsupported"),
        ("POST", "/v1/videos/characters", 400, "unsupported"),
        ("GET", "/v1/videos/characters/x", 400, "unsupported"),
        ("GET", "/v1/models/gpt", 404, "model_not_found"),
    ],
)
def test_bad_paths_are_refused(server, method, path, status, code):
    error_of(server.http.request(method, path), status, code)
