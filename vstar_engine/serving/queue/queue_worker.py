"""The threads that start queued jobs, woken when a job is stored; between jobs they poll rarely.

DBOS polls its queues at one fixed interval: 20 polls a second take an idle server 7.5 % of a core. So DBOS's loop over a queue
runs in a thread here, with a `WakeEvent` as its stop event.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

from dbos import DBOS, Queue
from dbos._queue import queue_worker_thread

from vstar_engine.serving.settings import Intervals

log = logging.getLogger(__name__)

# seconds that a poll may take to end
LONGEST_POLL = 10.0


class WakeEvent:
    """Replaces the stop event of DBOS's loop. Its `wait` also returns when `wake` is called.

    waiting: returns whether jobs wait; the loop then keeps its own interval.
    idle_poll: seconds between two polls while no job waits.
    """

    def __init__(self, waiting: Callable[[], bool], idle_poll: float):
        self._waiting, self._idle_poll = waiting, idle_poll
        self._woken, self._stopped = threading.Event(), threading.Event()

    def wake(self) -> None:
        """Ends the current or the next wait."""
        self._woken.set()

    def stop(self) -> None:
        """Ends the loop."""
        self._stopped.set()
        self._woken.set()

    def is_set(self) -> bool:
        """Returns whether the loop shall end."""
        return self._stopped.is_set()

    def wait(self, timeout: float) -> bool:
        """Waits `timeout` seconds while jobs wait, otherwise until `wake` or the idle poll; returns whether to end."""
        if self._waiting():
            self._stopped.wait(timeout)
        else:
            self._woken.wait(self._idle_poll)
        self._woken.clear()
        return self.is_set()


class QueueWorker:
    """The threads over the job queue and over DBOS's internal queue, which holds recovered jobs."""

    def __init__(self, launched: DBOS, queue: Queue, waiting: Callable[[], bool], alone: bool, intervals: Intervals):
        idle_poll = intervals.idle_poll if alone else intervals.shared_idle_poll
        loops: list[tuple[WakeEvent, Any]] = [
            (WakeEvent(waiting, idle_poll), queue),
            (WakeEvent(waiting, intervals.recovered_idle_poll), launched._registry.get_internal_queue()),
        ]
        self._events = [event for event, _ in loops]
        self._threads = [
            threading.Thread(target=queue_worker_thread, args=(event, launched, each), name=f"queue {each.name}", daemon=True)
            for event, each in loops
        ]
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Polls the queues now."""
        for event in self._events:
            event.wake()

    def stop(self) -> None:
        """Stops the threads; returns once no more jobs are started."""
        for event in self._events:
            event.stop()
        for thread in self._threads:
            thread.join(LONGEST_POLL)
            if thread.is_alive():
                log.warning("the last poll of the %s did not end within %g s", thread.name, LONGEST_POLL)
