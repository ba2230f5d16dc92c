"""The errors of the job store."""

import asyncio

from dbos._error import DBOSQueryTimeoutError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnection

from vstar_engine.errors import VstarError

from .sqlite import DiskError

# the database cannot be used now: it is full, gone, locked, slow, or read-only after a failover
UNAVAILABLE = (DBAPIError, NoConnection, DBOSQueryTimeoutError, DiskError)


class StoreError(VstarError, RuntimeError):
    """The database of jobs cannot be opened."""

    exit_code = 4


class Stopped(asyncio.CancelledError):
    """Ends a run without an outcome: the job is already cancelled, or stays in the store for the next start."""
