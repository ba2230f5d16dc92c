"""The addresses that the server takes before it starts, and how long a client may hold a connection."""

import argparse
import asyncio
import contextlib
import gc
import signal
import socket
import time

import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from vstar_engine.commands import serve
from vstar_engine.serving.http.server import Server, bound
from vstar_engine.serving.settings import Settings


def test_answers_are_sent_at_once():
    """Else the last part of one waits for the client's system to acknowledge the one before, 40 ms."""
    seen = []

    async def scenario():
        def noted(reader, writer):
            held = writer.get_extra_info("socket")
            seen.append(held.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        (ours,) = bound("127.0.0.1", 0)
        async with await asyncio.start_server(noted, sock=ours):
            reader, writer = await asyncio.open_connection(*ours.getsockname())
            await reader.read()
            writer.close()

    asyncio.run(scenario())
    assert len(seen) == 1
    assert seen[0] != 0


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ValueError, match=r"cannot listen at 127\.0\.0\.1:\d+: Address already in use; give another --host"):
            bound("127.0.0.1", other.getsockname()[1])


class Nothing:
    """A service, as far as the server asks for one."""

    failure = None

    def __init__(self, **settings):
        self.settings = Settings(**settings)

    async def start(self):
        pass

    async def close(self):
        pass


class Undrained(Nothing):
    """A service that fails when it is to end."""

    async def drain(self):
        raise OSError("no")


async def read_body(scope, receive, send):
    """Answers with the length of a body; /silent asks for none, /slow takes a second."""
    length, more = 0, scope["path"] != "/silent"
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length, more = length + len(message["body"]), message["more_body"]
    await asyncio.sleep(1.0 if scope["path"] == "/slow" else 0.0)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"%04d" % length})


@pytest.fixture(autouse=True)
def thawed():
    """Undoes what a server does to the objects of its process."""
    yield
    gc.unfreeze()


def served(act, **settings):
    """Runs `act(connect)` while a server listens."""

    async def scenario():
        server, (held,) = Server(read_body, Nothing(**settings)), bound("127.0.0.1", 0)
        running = asyncio.create_task(server.serve(sockets=[held]))
        address = held.getsockname()
        while not server.started:
            await asyncio.sleep(0.01)
        async with asyncio.timeout(30):
            result = await act(lambda: asyncio.open_connection(*address))
        server.end()
        await running
        return result

    return asyncio.run(scenario())


def test_what_is_there_at_the_start_is_never_collected_again():
    """Else a full collection among the first requests holds them up for the time that looking through every library takes."""

    async def act(connect):
        return gc.get_freeze_count(), len(gc.get_objects())

    frozen, looked_through = served(act)
    assert frozen > looked_through


def test_a_server_that_cannot_wait_for_what_runs_ends_all_the_same(caplog):
    """Else a signal left it running, without a word."""

    async def scenario():
        server, (held,) = Server(read_body, Undrained()), bound("127.0.0.1", 0)
        running = asyncio.create_task(server.serve(sockets=[held]))
        while not server.started:
            await asyncio.sleep(0.01)
        server.handle_exit(signal.SIGTERM, None)
        async with asyncio.timeout(10):
            await running

    asyncio.run(scenario())
    assert "draining failed" in caplog.text


GET = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
# what a client sends at first, and then byte by byte
SLOW_CLIENTS = {
    "nothing": (b"", b""),
    "half a header": (b"GET /livez HTTP/1.1\r\nX-A: ", b""),
    "a header byte by byte": (b"GET /livez HTTP/1.1\r\nX-A: ", b"a"),
    "a body byte by byte": (b"POST /v1/videos HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n\r\n", b"a"),
    "a body that is answered already": (b"POST /silent HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n\r\n", b"a"),
    "a second request byte by byte": (GET + b"GET /livez HTTP/1.1\r\nX-A: ", b"a"),
}


@pytest.mark.parametrize("name", SLOW_CLIENTS)
def test_a_client_has_so_long_for_a_request(name):
    first, more = SLOW_CLIENTS[name]

    async def act(connect):
        reader, writer = await connect()
        begun = time.monotonic()
        writer.write(first)
        ended = asyncio.create_task(reader.read())
        while not ended.done() and time.monotonic() - begun < 5.0:
            writer.write(more)
            await asyncio.wait([ended], timeout=0.1)
        took = time.monotonic() - begun
        writer.close()
        with contextlib.suppress(ConnectionError):
            await ended
        return took

    assert 0.5 < served(act, idle_timeout=0.6) < 3.0


def test_a_client_that_asks_in_time_is_answered_however_long_that_takes():
    async def act(connect):
        reader, writer = await connect()
        said = []
        for request in (b"POST /slow HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", GET, GET):
            writer.write(request)
            said.append((await reader.readuntil(b"\r\n\r\n"), await reader.readexactly(4)))
            await asyncio.sleep(0.3)
        writer.close()
        return [body for _, body in said]

    assert served(act, idle_timeout=0.6) == [b"0003", b"0000", b"0000"]


def test_beyond_the_bound_the_slowest_client_goes():
    async def act(connect):
        slow = await connect()
        slow[1].write(b"GET /li")
        await asyncio.sleep(0.05)
        busy = await connect()
        busy[1].write(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
        await asyncio.sleep(0.05)
        third = await connect()
        third[1].write(GET)
        with contextlib.suppress(ConnectionError):
            assert await slow[0].read() == b""
        answers = [(await reader.readuntil(b"\r\n\r\n"))[:15] for reader, _ in (third, busy)]
        for _, writer in (slow, busy, third):
            writer.close()
        return answers

    assert served(act, max_connections=2) == [b"HTTP/1.1 200 OK"] * 2


def test_a_connection_between_requests_stays_as_long_as_the_flag_says():
    async def act(connect):
        reader, writer = await connect()
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(4)
        begun = asyncio.get_running_loop().time()
        assert await reader.read() == b""
        writer.close()
        return asyncio.get_running_loop().time() - begun

    parser = argparse.ArgumentParser()
    serve.add_options(parser)
    settings = serve.settings_from(parser.parse_args(["--keep-alive", "1"]))
    assert 0.9 < served(act, keep_alive=settings.keep_alive) < 10
