"""The client against a server that answers, refuses, vanishes and breaks off when told to."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from vstar_engine import client as module
from vstar_engine.client import Client, RemoteVideo
from vstar_engine.commands.main import main
from vstar_engine.commands.remote_jobs import line
from vstar_engine.errors import JobFailed, OutputError, ServerError

ID = "video_" + "0" * 32
MP4 = b"not really an mp4" * 1000
FULL = {"error": {"message": "the queue is full", "type": "rate_limit_error", "code": "queue_full", "param": None}}
BUSY = (429, {"Retry-After": "0"}, FULL)


def video(status="queued", progress=0, **more):
    return {"id": ID, "object": "video", "status": status, "progress": progress, "prompt": "a lake", "error": None, **more}


FAILED = video("failed", 40, error={"code": "out_of_memory", "message": "64 frames do not fit"})


class Stub:
    """A server that gives its answers in order, the last for ever, and keeps what it was asked."""

    def __init__(self):
        self.answers, self.asked = [], []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler):
                self.answer(handler)

            do_POST = do_DELETE = do_GET

            def log_message(handler, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler):
        body = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        path = urlsplit(handler.path)
        asked = {"path": path.path, "method": handler.command, "headers": dict(handler.headers), "query": parse_qs(path.query)}
        self.asked.append({**asked, "body": json.loads(body) if body else None})
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            answer(handler)
            return
        if answer == "vanish":
            handler.connection.close()
            return
        status, headers, content = answer if isinstance(answer, tuple) else (200, {}, answer)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)


@pytest.fixture
def stub(monkeypatch):
    for name in ("VSTAR_SERVER", "VSTAR_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    made = Stub()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def client(stub):
    with Client(stub.url, key="sk-mine", patience=2.0) as made:
        yield made


def test_submit_sends_what_was_given_and_nothing_else(stub, client):
    stub.answers = [video()]
    made = client.submit("a lake", synopsis=["snow", "thaw"], seed=None, tar={"sigma": {"0": 2.0}})
    assert (made.id, made.status, made.ended) == (ID, "queued", False)
    (asked,) = stub.asked
    assert (asked["method"], asked["path"]) == ("POST", "/v1/videos")
    assert asked["body"] == {"prompt": "a lake", "synopsis": ["snow", "thaw"], "tar": {"sigma": {"0": 2.0}}}
    assert asked["headers"]["Authorization"] == "Bearer sk-mine"


@pytest.mark.parametrize("first", [BUSY, "vanish", (503, {}, b"a proxy's page")], ids=["full", "vanished", "unavailable"])
def test_a_repeated_submission_carries_the_same_idempotency_key(stub, client, first):
    stub.answers = [first, first, video()]
    client.submit("a lake")
    keys = {asked["headers"]["Idempotency-Key"] for asked in stub.asked}
    assert len(stub.asked) == 3
    assert len(keys) == 1
    client.submit("a lake")
    assert stub.asked[-1]["headers"]["Idempotency-Key"] not in keys


@pytest.mark.parametrize(
    ("answer", "status", "code", "words"),
    [
        (
            (400, {}, {"error": {"message": "no such preset", "code": "invalid_value", "param": "tar"}}),
            400,
            "invalid_value",
            "no such",
        ),
        ((429, {"x-should-retry": "false"}, FULL), 429, "queue_full", "the queue is full"),
        ((429, {"Retry-After": "9"}, FULL), 429, "queue_full", "the queue is full"),
        ((502, {"x-should-retry": "false"}, b"<html>bad gateway"), 502, None, "HTTP 502: <html>bad gateway"),
    ],
    ids=["refused", "told not to", "longer than patience", "no JSON"],
)
def test_what_no_repetition_helps_is_raised_at_once(stub, client, answer, status, code, words):
    stub.answers = [answer]
    with pytest.raises(ServerError, match=words) as raised:
        client.submit("a lake")
    assert (raised.value.status, raised.value.code) == (status, code)
    assert len(stub.asked) == 1


def test_a_server_that_is_not_there_is_named():
    with Client("http://127.0.0.1:9", patience=0.0) as gone, pytest.raises(ServerError, match=r"127.0.0.1:9 .*serve` running"):
        gone.status(ID)
    with pytest.raises(ValueError, match="starts with http"):
        Client("localhost:8000")


def test_wait_tells_each_change_once_and_lives_through_a_restart(stub, client):
    soon = {"openai-poll-after-ms": "5"}
    running = (200, soon, video("in_progress", 50))
    stub.answers = [(200, soon, video()), running, running, "vanish", "vanish", (200, soon, video("completed", 100))]
    seen = []
    assert client.wait(ID, lambda now: seen.append((now.status, now.progress))).progress == 100
    assert seen == [("queued", 0), ("in_progress", 50), ("completed", 100)]


def test_wait_raises_what_the_job_failed_with(stub, client):
    stub.answers = [FAILED]
    with pytest.raises(JobFailed, match="64 frames do not fit") as raised:
        client.wait(ID)
    assert raised.value.code == "out_of_memory"
    stub.answers = [(200, {"openai-poll-after-ms": "5"}, video("in_progress", 7))]
    with pytest.raises(TimeoutError, match=r"in_progress, 7 %, after 0.05 seconds"):
        client.wait(ID, timeout=0.05)


def test_fetch_writes_the_whole_file_or_none(stub, client, tmp_path):
    stub.answers = [MP4]
    path = client.fetch(ID, tmp_path / "a.mp4", "video")
    assert path.read_bytes() == MP4
    assert stub.asked[-1]["query"] == {"variant": ["video"]}
    with pytest.raises(OutputError, match="exists"):
        client.fetch(ID, path)
    stub.answers = [(200, {"Content-Length": str(2 * len(MP4))}, MP4)]
    with pytest.raises(ServerError, match="broke off in the middle"):
        client.fetch(ID, tmp_path / "b.mp4")
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    with pytest.raises(ValueError, match="video, thumbnail, spritesheet, got 'gif'"):
        client.fetch(ID, path, "gif")


def test_list_follows_the_cursor(stub, client):
    pages = [
        {"data": [video(id=f"v{i}") for i in page], "last_id": f"v{page[-1]}", "has_more": more}
        for page, more in (((1, 2), True), ((3,), False))
    ]
    stub.answers = [*pages, None]
    assert [found.id for found in client.list()] == ["v1", "v2", "v3"]
    assert [asked["query"].get("after") for asked in stub.asked] == [None, ["v2"]]
    stub.answers = [pages[0]]
    assert len(list(client.list(2, "asc"))) == 2
    assert stub.asked[-1]["query"] == {"order": ["asc"], "limit": ["2"]}


def test_events_are_read_line_by_line(stub, client):
    lines = b': hello\n\nevent: step\ndata: {"done": 1,\ndata: "total": 4}\n\nevent: completed\ndata: {"progress": 100}\n\n'
    stub.answers = [(200, {"Content-Type": "text/event-stream"}, lines)]
    assert list(client.events(ID)) == [{"event": "step", "done": 1, "total": 4}, {"event": "completed", "progress": 100}]


def test_cancel_and_delete(stub, client):
    stub.answers = [video("failed", error={"code": "cancelled", "message": "as asked"}), {"deleted": True}]
    assert client.cancel(ID).error["code"] == "cancelled"
    client.delete(ID)
    assert [(asked["method"], asked["path"].removeprefix(f"/v1/videos/{ID}")) for asked in stub.asked] == [
        ("POST", "/cancel"),
        ("DELETE", ""),
    ]


@pytest.mark.parametrize("id", ["", "../../metrics", "a/b", "a?b"])
def test_an_id_is_never_a_path(client, id):
    with pytest.raises(ValueError, match="letters, digits and underscores"):
        client.status(id)


@pytest.fixture
def here(stub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VSTAR_SERVER", stub.url)
    return tmp_path


def test_submit_sends_the_options_in_the_servers_words(stub, here, capsys):
    stub.answers = [video()]
    options = ["--states", "snow", "thaw", "--at", "0", "100%", "--frames", "32", "--size", "96x128", "--steps", "20"]
    options += [
        "--tar",
        "64D1",
        "--sigma",
        "1=4",
        "--until",
        "50%",
        "--guidance",
        "6",
        "--metadata",
        "who=me",
        "--priority",
        "2",
    ]
    assert main(["submit", *options]) == 0
    assert capsys.readouterr().out == f"{ID}\n"
    assert stub.asked[0]["body"] == {
        "prompt": "snow",
        "synopsis": [{"text": "snow", "at": 0}, {"text": "thaw", "at": 1.0}],
        "num_frames": 32,
        "size": "128x96",
        "num_inference_steps": 20,
        "tar": {"preset": "64D1", "sigma": {"1": 4.0}, "until": "50%"},
        "guidance_scale": 6.0,
        "metadata": {"who": "me"},
        "priority": 2,
    }


def test_submit_with_out_waits_and_writes(stub, here, capsys):
    stub.answers = [video(), video("completed", 100), MP4]
    assert main(["submit", "a lake", "--out", "a.mp4"]) == 0
    assert (here / "a.mp4").read_bytes() == MP4
    assert f"wrote a.mp4 ({ID})" in capsys.readouterr().out


def test_the_key_comes_from_a_file(stub, here):
    (here / "key").write_text("sk-file\nand notes\n")
    stub.answers = [video()]
    assert main(["status", ID, "--key-file", "key"]) == 0
    assert stub.asked[0]["headers"]["Authorization"] == "Bearer sk-file"
    assert main(["status", ID, "--key-file", "nowhere"]) == 2


@pytest.mark.parametrize(
    ("words", "answer", "code", "said"),
    [
        (["submit", "p", "--states", "a"], None, 2, "exactly one of PROMPT, --states"),
        (["submit", "p", "--out", "a.gif"], None, 2, "a server sends mp4 files"),
        (["submit", "p", "--metadata", "who"], None, 2, "metadata is NAME=TEXT"),
        (["submit", "p", "--at", "0"], None, 2, "give --states"),
        (["submit", "--states", "a", "b", "--at", "0"], None, 2, "1 at for 2 states"),
        (["submit", "--states", "a", "b", "--durations", "1", "2", "3"], None, 2, "3 durations for 2 states"),
        (["submit", "p"], (400, {}, FULL), 10, "the queue is full"),
        (["submit", "p", "--wait"], FAILED, 11, "64 frames do not fit"),
        (["status", ID], FAILED, 1, ""),
        (["fetch", ID], video("in_progress", 30), 2, "is in_progress, 30 %"),
        (["cancel", ID], (404, {}, {"error": {"message": "no such video"}}), 10, "no such video"),
    ],
    ids=lambda value: "-".join(value[:1]) if isinstance(value, list) else "",
)
def test_what_goes_wrong_is_a_sentence_and_a_code(stub, here, capsys, words, answer, code, said):
    stub.answers = [answer]
    assert main(words) == code
    assert said in capsys.readouterr().err
    assert bool(stub.asked) == (answer is not None)
    assert not [file for file in here.iterdir() if file.suffix == ".mp4"]


def test_status_lists_the_newest(stub, here, capsys):
    stub.answers = [{"data": [video(), FAILED], "last_id": ID, "has_more": False}]
    assert main(["status"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "queued" in first
    assert "out_of_memory" in second


def cut(handler):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"half of it")


def test_half_a_video_is_no_video(stub, client, tmp_path):
    whole = video("completed", 100, bytes=len(MP4), sha256=hashlib.sha256(MP4).hexdigest())
    stub.answers = [cut, whole] * 2 + [MP4]
    client.fetch(ID, tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == MP4
    stub.answers = [cut, whole] * 3
    with pytest.raises(ServerError, match=r"sent 10 bytes of .* cut short"):
        client.fetch(ID, tmp_path / "b.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_content_is_held_to_its_tag(stub, client, tmp_path):
    stub.answers = [(200, {"ETag": '"' + "ab" * 32 + '"'}, MP4)]
    with pytest.raises(ServerError, match="are not its thumbnail"):
        client.fetch(ID, tmp_path / "a.jpg", "thumbnail")
    stub.answers = [(200, {"ETag": f'"{hashlib.sha256(MP4).hexdigest()}"'}, MP4)]
    client.fetch(ID, tmp_path / "a.jpg", "thumbnail")


@pytest.mark.parametrize(
    "answer", [{"detail": "hello"}, [1], {"id": 3, "status": "x"}, {"id": "a", "status": "b", "progress": "c"}]
)
def test_another_service_is_told(stub, client, answer):
    stub.answers = [answer]
    for ask in (lambda: client.status(ID), lambda: client.submit("p"), lambda: client.wait(ID), lambda: list(client.list())):
        with pytest.raises(ServerError, match="is this a vstar-engine server"):
            ask()


def test_a_key_is_cleaned_and_never_shown(stub, here, monkeypatch, capsys):
    stub.answers = [{"data": [], "has_more": False}]
    (here / "key").write_bytes(b"\xef\xbb\xbfsk-secret\r\n")
    assert main(["status", "--server", stub.url, "--key-file", "key"]) == 0
    monkeypatch.setenv("VSTAR_API_KEY", "sk-secret\n")
    assert main(["status", "--server", stub.url]) == 0
    assert {asked["headers"]["Authorization"] for asked in stub.asked} == {"Bearer sk-secret"}
    monkeypatch.setenv("VSTAR_API_KEY", "sk-secret\nsk-other")
    assert main(["status", "--server", stub.url]) == 2
    assert main(["status", "--server", "http://user:sk-pass@127.0.0.1:9", "--patience", "0"]) == 2
    monkeypatch.setenv("VSTAR_API_KEY", "")
    assert main(["status", "--server", "http://user:sk-pass@127.0.0.1:9", "--patience", "0"]) == 10
    assert "sk-" not in capsys.readouterr().err


def test_a_prompt_of_two_lines_is_one_line(stub, here, capsys):
    stub.answers = [{"data": [video(prompt="one\ntwo\x1b[2Jthree")], "has_more": False}]
    assert main(["status", "--server", stub.url]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert "\x1b" not in line(RemoteVideo.of(video(prompt="\x1b[2J")))
