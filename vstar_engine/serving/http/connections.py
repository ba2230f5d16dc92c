"""HTTP connections with a time limit for each request and a limit on open connections."""

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from vstar_engine.serving.settings import Settings

log = logging.getLogger(__name__)

# states in which the client still has to send: a request, or its body
INCOMPLETE = (h11.IDLE, h11.SEND_BODY)


class Connection(H11Protocol):
    """uvicorn's connection, which limits only the pause between two requests, with a limit for each request too.

    most: open connections. Beyond it the one closes whose client has been idle longest, or the newest if none is idle.
    idle: seconds for a client to send a whole request; uvicorn limits the pause between two.
    """

    most = Settings.max_connections
    idle = Settings.idle_timeout

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self._timer: asyncio.TimerHandle | None = None
        self._blocked = False
        self._since = 0.0
        following = self.conn.next_event
        # a target with the scheme and host before its path, which a server must take too (RFC 9112, 3.2.2)
        self.conn.next_event = lambda: _with_path_alone(following())  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._start_timer()
        if len(self.connections) > self.most:
            self._longest_waiting().end("there are too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state in INCOMPLETE:
            self._start_timer()
        else:
            self._stop_timer()
            self._since = self.loop.time()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._blocked, self._since = True, self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._blocked = False

    @property
    def waits(self) -> bool:
        """Returns whether the server waits for the client: for a request, for the rest of it, or for it to read."""
        return self._blocked or self.conn.their_state in INCOMPLETE

    def _longest_waiting(self) -> "Connection":
        """Returns the connection to close."""
        waiting = [each for each in self.connections if isinstance(each, Connection) and each.waits and each is not self]
        return min(waiting, key=lambda each: each._since, default=self)

    def _start_timer(self) -> None:
        if self._timer is None:
            self._since = self.loop.time()
            self._timer = self.loop.call_later(self.idle, self.end, "its request timed out")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def end(self, why: str) -> None:
        """Closes the connection at once; unsent data is dropped."""
        log.debug("closing a connection: %s", why)
        self.connections.discard(self)
        self.transport.abort()


def _with_path_alone(event: Any) -> Any:
    """Returns an event of h11 whose target has no scheme and host."""
    if not isinstance(event, h11.Request) or not event.target.lower().startswith((b"http://", b"https://")):
        return event
    _, _, rest = event.target.partition(b"://")
    _, slash, path = rest.partition(b"/")
    target = slash + path or b"/"
    return h11.Request(method=event.method, headers=event.headers, target=target, http_version=event.http_version)
