"""A small server that speaks the Hub's protocol: what a model holds, and its files, whole or from a byte on."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(r"/api/models/(?P<id>[^/]+/[^/?]+)(?:/revision/(?P<revision>[^/?]+))?")
RESOLVE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>[^?]+)")


@dataclass
class Hub:
    """Models by their ids, each a folder; `faults` has a status and a code for an id, `cut` the bytes after which files end."""

    models: dict[str, Path]
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    url: str = ""

    def files(self, id: str) -> dict[str, Path]:
        folder = self.models[id]
        return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


class Handler(BaseHTTPRequestHandler):
    """Answers for the hub that its server has."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        hub.requests.append(f"{self.command} {self.path.partition('?')[0]}")
        if token := self.headers.get("Authorization"):
            hub.tokens.add(token.removeprefix("Bearer "))
        found = API.match(self.path) or RESOLVE.match(self.path)
        given = found.groupdict() if found else {}
        id = given.get("id", "")
        if id in hub.faults:
            status, code = hub.faults[id]
            return self.send(status, b"", {"X-Error-Code": code} if code else {})
        if id not in hub.models:
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if given["revision"] not in (None, "main", COMMIT):
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if "file" not in given:
            return self.send(200, json.dumps(self.listing(hub, id)).encode(), {"Content-Type": "application/json"}, body)
        if given["file"] not in hub.files(id):
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self.send_file(hub, given["file"], hub.files(id)[given["file"]].read_bytes(), body)

    def listing(self, hub: Hub, id: str) -> dict[str, object]:
        siblings = []
        for name, path in hub.files(id).items():
            content = path.read_bytes()
            lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
            siblings.append({"rfilename": name, "size": len(content), "blobId": "0", "lfs": lfs})
        return {
            "id": id,
            "sha": COMMIT,
            "siblings": siblings,
            "cardData": {"license": "apache-2.0"},
            "tags": [],
            "downloads": 0,
        }

    def send_file(self, hub: Hub, name: str, content: bytes, body: bool) -> None:
        digest, start = hashlib.sha256(content).hexdigest(), 0
        if (asked := self.headers.get("Range")) and (found := re.match(r"bytes=(\d+)-", asked)):
            start = int(found[1])
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(206 if start else 200, content[start:], headers, body, hub.cut.get(name))

    def send(self, status: int, content: bytes, headers: dict[str, str], body: bool = False, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serves a hub on a free port of this machine while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = hub  # type: ignore[attr-defined]
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
