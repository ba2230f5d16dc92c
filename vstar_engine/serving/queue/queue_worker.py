"""Takes jobs off the queue: as soon as one waits here, else by a slow look for those that other servers left.

DBOS looks into the database at one pace for as long as it runs, and 20 looks a second cost an idle server 7.5 % of a core. So
its own loop over a queue runs here, with a bell in the place of the event that ends it.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

from dbos import DBOS, Queue
from dbos._queue import queue_worker_thread

log = logging.getLogger(__name__)

# seconds between two looks while jobs wait; while none is known to: in a database of this server alone, and of several
LOOK = 0.05
SLOW_ALONE, SLOW_SHARED = 5.0, 1.0
# the same for DBOS's own queue, into which it puts jobs that ran when a server ended
SLOW_RECOVERED = 30.0
# seconds that a look may take to end
ENDING = 10.0


class Bell:
    """What DBOS's loop takes for its stop event: it also wakes the loop where `ring` says that a job came."""

    def __init__(self, waiting: Callable[[], bool], slow: float):
        self._waiting, self._slow = waiting, slow
        self._rung, self._stopped = threading.Event(), threading.Event()

    def ring(self) -> None:
        self._rung.set()

    def stop(self) -> None:
        self._stopped.set()
        self._rung.set()

    def is_set(self) -> bool:
        return self._stopped.is_set()

    def wait(self, timeout: float) -> bool:
        """Waits for the queue's own time while jobs wait, else until a job comes or the slow look is due."""
        if self._waiting():
            self._stopped.wait(timeout)
        else:
            self._rung.wait(self._slow)
        self._rung.clear()
        return self.is_set()


class QueueWorker:
    """The threads that take a queue's jobs, and those that DBOS recovered, and start their runs."""

    def __init__(self, launched: DBOS, queue: Queue, waiting: Callable[[], bool], alone: bool):
        self._bell = Bell(waiting, SLOW_ALONE if alone else SLOW_SHARED)
        self._recovered = Bell(waiting, SLOW_RECOVERED)
        listened: list[tuple[Bell, Any]] = [(self._bell, queue), (self._recovered, launched._registry.get_internal_queue())]
        self._threads = [
            threading.Thread(target=queue_worker_thread, args=(bell, launched, each), name=f"queue {each.name}", daemon=True)
            for bell, each in listened
        ]
        for thread in self._threads:
            thread.start()

    def ring(self) -> None:
        """Has jobs looked for now."""
        self._bell.ring()
        self._recovered.ring()

    def stop(self) -> None:
        """Returns when no more jobs are taken."""
        self._bell.stop()
        self._recovered.stop()
        for thread in self._threads:
            thread.join(ENDING)
            if thread.is_alive():
                log.warning("the last look into the %s did not end within %g s", thread.name, ENDING)
