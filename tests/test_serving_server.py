"""The addresses that the server takes before it starts."""

import asyncio
import socket

import pytest
import serve_packages  # noqa: F401 - skips where they are missing

from vstar_engine.serving.server import bound


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
