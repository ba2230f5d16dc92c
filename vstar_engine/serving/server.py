"""Runs the application under uvicorn and ends it in order: no new jobs, the running ones finished, then the sockets."""

import asyncio
import logging
import signal
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from .service import Service

log = logging.getLogger(__name__)

# an ending server leaves its slowest readers after this many seconds
LAST_ANSWERS = 2
# slow clients may not hold a connection without a word for longer
IDLE = 30


class Server(uvicorn.Server):
    """A server whose first signal drains it while it still answers, and whose second ends it at once."""

    def __init__(self, app: ASGIApp, service: Service):
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                app,
                settings.host,
                settings.port,
                log_config=None,
                access_log=False,
                lifespan="on",
                server_header=False,
                timeout_keep_alive=IDLE,
                timeout_graceful_shutdown=LAST_ANSWERS,
            )
        )
        self.service = service
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        service.on_failure = self.end

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)  # type: ignore[arg-type]

    def end(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains at the first signal, ends at the second."""
        if self._loop is None or self._draining is not None:
            self.should_exit = True
            self.force_exit = self._draining is not None
            return
        log.info("%s: finishing what runs, taking nothing new", signal.Signals(sig).name)
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = self._draining or asyncio.create_task(self._drained())

    async def _drained(self) -> None:
        await self.service.drain()
        self.end()
