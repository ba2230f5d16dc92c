"""Runs the application under uvicorn and shuts down gracefully: no new jobs, running jobs end, then sockets close."""

import asyncio
import contextlib
import errno
import gc
import logging
import math
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from vstar_engine.errors import VstarError

from .connections import Connection
from .service import Service

log = logging.getLogger(__name__)

# seconds that a shutdown waits for slow readers
LAST_ANSWERS = 2
# errors of addresses that this machine lacks; a host name may have several addresses
ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def bound(host: str, port: int) -> list[socket.socket]:
    """Binds sockets to all addresses of a host, without listening yet; ValueError if they are in use or not available."""
    sockets, absent = [], None
    with contextlib.ExitStack() as undo:
        try:
            for family, *_, address in dict.fromkeys(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)):
                try:
                    sockets.append(undo.enter_context(_bind(family, address)))
                except OSError as error:
                    if error.errno not in ABSENT:
                        raise
                    absent = error
            if absent is not None and not sockets:
                raise absent
        except OSError as error:
            raise ValueError(f"cannot listen at {host}:{port}: {error.strerror}; give another --host or --port") from error
        undo.pop_all()
    return sockets


def _bind(family: socket.AddressFamily, address: Any) -> socket.socket:
    with contextlib.ExitStack() as undo:
        # asyncio sets TCP_NODELAY only on sockets with the protocol TCP
        held = undo.enter_context(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        held.bind(address)
        undo.pop_all()
    return held


class Server(uvicorn.Server):
    """A server that drains at the first signal, still answering, and stops at once at the second."""

    def __init__(self, app: ASGIApp, service: Service):
        settings = service.settings
        limits = {"most": settings.max_connections, "idle": settings.idle_timeout}
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                http=type("Bounded", (Connection,), limits),
                timeout_keep_alive=math.ceil(settings.keep_alive),
                timeout_graceful_shutdown=LAST_ANSWERS,
            )
        )
        self.service = service
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        service.on_failure = self.end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts the service, then listens; does not listen if the start fails."""
        self._loop = asyncio.get_running_loop()
        try:
            await self.service.start()
        except VstarError as error:
            self.service.failure, self.should_exit = error, True
            return
        # objects of the start stay: a full collection of them would delay every request by 80 ms
        gc.collect()
        gc.freeze()
        await super().startup(sockets)
        for held in sockets or ():
            host, port = held.getsockname()[:2]
            log.info("listening at http://%s:%d", f"[{host}]" if ":" in host else host, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if not self.force_exit:
            await self.service.close()

    def end(self) -> None:
        """Stops the server."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains at the first signal, stops at the second."""
        if self._loop is None or self._draining is not None:
            self.should_exit = True
            self.force_exit = self._draining is not None
            return
        log.info("%s: finishing running jobs, accepting no new ones", signal.Signals(sig).name)
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = self._draining or asyncio.create_task(self._drained())

    async def _drained(self) -> None:
        try:
            await self.service.drain()
        except Exception:
            log.exception("draining failed; unfinished jobs resume at the next start")
        self.end()
