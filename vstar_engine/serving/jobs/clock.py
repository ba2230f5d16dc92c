"""The time that ages are told by: a clock that is set while the server runs makes nothing older than it is."""

import time

# goes on while the machine sleeps, where the system has such a clock
_GOES_ON = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_STARTED = time.time() - time.clock_gettime(_GOES_ON)


def _undisturbed() -> float:
    """Returns the time that the clock would show if nobody had set it since the start."""
    return _STARTED + time.clock_gettime(_GOES_ON)


def now() -> float:
    """Returns the time to hold an end or a file against: not the clock's where that was set ahead."""
    return min(time.time(), _undisturbed())


def stamp() -> float:
    """Returns the time to note of an end: not the clock's where that was set back."""
    return max(time.time(), _undisturbed())
