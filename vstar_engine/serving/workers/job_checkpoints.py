"""Checkpoints of long jobs in a worker: a job that is run again goes on where it was."""

import logging
from pathlib import Path
from weakref import WeakKeyDictionary

from vstar_engine.config.windows import FIFO
from vstar_engine.engine import Engine
from vstar_engine.errors import OutputError
from vstar_engine.sampling.batch import Batch, BatchRow
from vstar_engine.sampling.saved_state import Checkpoint

log = logging.getLogger(__name__)

# checkpoints of cancelled and failed jobs stay until there are more than so many
KEPT = 8
ENDING = ".checkpoint"


class JobCheckpoints:
    """A folder with the checkpoints of jobs in windows, a file a job."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows: WeakKeyDictionary[BatchRow, Checkpoint] = WeakKeyDictionary()

    def begin(self, engine: Engine, batch: Batch, id: str) -> None:
        """Sets a fresh batch of one job to its checkpoint, if it is in windows and has one that fits."""
        (row,) = batch.rows
        if row.request.plan is None or row.request.blend == FIFO:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._limit()
        path = self.folder / f"{id}{ENDING}"
        self.rows[row] = Checkpoint(path)
        if path.exists():
            try:
                Checkpoint(path, resume=True).begin(batch, engine.identity)
                log.info("job %s goes on after step %d", id, batch.done)
            except ValueError as error:
                log.warning("job %s begins anew: %s", id, error)
                path.unlink(missing_ok=True)

    def keep(self, engine: Engine, batch: Batch) -> None:
        """Writes the checkpoint of a batch where it is due; a full disk costs the checkpoint, not the job."""
        checkpoint = self.rows.get(batch.rows[0])
        if checkpoint is None:
            return
        try:
            checkpoint.keep(batch, engine.identity)
        except OutputError as error:
            log.warning("no checkpoint was written: %s", error)

    def discard(self, row: BatchRow) -> None:
        """Removes the checkpoint of a finished job."""
        if (checkpoint := self.rows.pop(row, None)) is not None:
            checkpoint.path.unlink(missing_ok=True)

    def _limit(self) -> None:
        """Removes all but the newest checkpoints."""
        found = sorted(self.folder.glob(f"*{ENDING}"), key=lambda path: path.stat().st_mtime)
        for path in found[: -KEPT + 1]:
            path.unlink(missing_ok=True)
