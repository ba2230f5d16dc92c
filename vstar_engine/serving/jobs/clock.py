"""Wall-clock time for ages and expiry, robust against a clock that is set while the server runs."""

import time

# counts the time that the machine sleeps, where the system has such a clock
_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_STARTED = time.time() - time.clock_gettime(_STEADY)


def _unset() -> float:
    """Returns the wall-clock time as if nobody had set the clock since the start."""
    return _STARTED + time.clock_gettime(_STEADY)


def now() -> float:
    """Returns the time to compare ages with: never ahead of the truth, even if the clock was set forward."""
    return min(time.time(), _unset())


def stamp() -> float:
    """Returns the time to record for an event: never behind the truth, even if the clock was set back."""
    return max(time.time(), _unset())
