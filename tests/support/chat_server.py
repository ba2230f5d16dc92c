"""A local stand-in for an OpenAI-compatible chat endpoint: it speaks the wire format, and misbehaves when told to."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ALL = ("json_schema", "json_object", "plain")

# text of an answer, an HTTP status, or a function that writes the response itself
Answer = str | int | Callable[[BaseHTTPRequestHandler], None]


def choice(text: str | None, finish_reason: str = "stop") -> bytes:
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": finish_reason}]
    return json.dumps({"id": "chatcmpl-1", "object": "chat.completion", "model": "mock", "choices": choices}).encode()


def respond(handler: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def cut_short(text: str) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda handler: respond(handler, 200, choice(text, "length"))


def raw(body: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda handler: respond(handler, 200, body)


def hang(handler: BaseHTTPRequestHandler) -> None:
    handler.server.closing.wait(20)  # type: ignore[attr-defined]


def trickle(handler: BaseHTTPRequestHandler) -> None:
    """Sends a byte now and then, so that no single wait is long."""
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.closing.is_set():  # type: ignore[attr-defined]
        handler.wfile.write(b" ")
        time.sleep(0.05)


def broken(handler: BaseHTTPRequestHandler) -> None:
    """Promises more than it sends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')


class ChatServer:
    """Returns the answers in order, the last for ever; `forms` are the response formats it knows, others get HTTP 400."""

    def __init__(self, *answers: Answer, forms: tuple[str, ...] = ALL):
        self.answers, self.forms = list(answers), forms
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.headers.append(dict(self.headers))
                outer.paths.append(self.path)
                form = body.get("response_format", {}).get("type", "plain")
                if form not in outer.forms:
                    respond(self, 400, json.dumps({"error": {"message": f"unknown response_format {form}"}}).encode())
                    return
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                try:
                    if isinstance(answer, int):
                        respond(self, answer, b'{"error": {"message": "so it is"}}')
                    elif isinstance(answer, str):
                        respond(self, 200, choice(answer))
                    else:
                        answer(self)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client had enough

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.closing = threading.Event()  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.closing.set()  # type: ignore[attr-defined]
        self._server.shutdown()
        self._server.server_close()
