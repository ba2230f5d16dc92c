"""Connections: a request has to arrive within a time, and there is a bound on how many are open."""

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from vstar_engine.serving.settings import Settings

log = logging.getLogger(__name__)

# what a client still has to send: the start of a request, or its body
UNHEARD = (h11.IDLE, h11.SEND_BODY)


class Connection(H11Protocol):
    """uvicorn's connection, which times only the pause between two requests; this one also times each request.

    `most` may be open: beyond, the one goes whose client has let it wait longest, and where none waits, the newest.
    """

    most = Settings.max_connections
    idle = Settings.idle_timeout

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self._late: asyncio.TimerHandle | None = None
        self._stuck = False
        self._since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._time()
        if len(self.connections) > self.most:
            self._longest_waiting().end("there are too many")

    def connection_lost(self, exc: Exception | None) -> None:
        self._untime()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state in UNHEARD:
            self._time()
        else:
            self._untime()
            self._since = self.loop.time()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck, self._since = True, self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stuck = False

    @property
    def waits(self) -> bool:
        """Returns whether it is the client who has to go on: to ask, to send the rest, or to read."""
        return self._stuck or self.conn.their_state in UNHEARD

    def _longest_waiting(self) -> "Connection":
        """Returns the connection to part with."""
        waiting = [each for each in self.connections if isinstance(each, Connection) and each.waits and each is not self]
        return min(waiting, key=lambda each: each._since, default=self)

    def _time(self) -> None:
        if self._late is None:
            self._since = self.loop.time()
            self._late = self.loop.call_later(self.idle, self.end, "its request took too long")

    def _untime(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def end(self, why: str) -> None:
        """Closes it at once, whatever has not been sent."""
        log.debug("a connection is closed: %s", why)
        self.connections.discard(self)
        self.transport.abort()
