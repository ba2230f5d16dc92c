"""Weights that need no download: seeded ones for the mini model, written once through the real conversion."""

import logging
import os
import tempfile
from pathlib import Path

from . import __version__, synthetic
from .artifacts import MANIFEST
from .config import Spec
from .convert import convert
from .errors import CheckpointError, OutputError

log = logging.getLogger(__name__)

SEEDED = ("mini",)


def cache_folder() -> Path:
    """Gives the folder for what can be made again: $VSTAR_CACHE, or vstar-engine under the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VSTAR_CACHE") or Path(base) / "vstar-engine")


def weights(spec: Spec) -> Path:
    """Gives the folder of a model's own weights, making it at first; CheckpointError for models that have none."""
    if spec.name not in SEEDED:
        raise CheckpointError(
            f"model {spec.name} comes without weights; convert its checkpoint (`vstar-engine convert model.ckpt DIR`) "
            "and give the folder (--weights DIR)"
        )
    log.warning("the weights of %s are seeded, not trained: its videos show that the path works, not a scene", spec.name)
    folder = cache_folder() / f"{spec.name}-{__version__}"
    if (folder / MANIFEST).is_file():
        return folder
    log.info("making seeded weights for %s in %s", spec.name, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            checkpoint = Path(scratch) / f"{spec.name}.ckpt"
            synthetic.write(spec, checkpoint)
            convert(checkpoint, folder, spec.name, force=True)
    except OSError as error:
        raise OutputError(f"cannot keep the weights of {spec.name} in {folder.parent}: {error}; set VSTAR_CACHE") from error
    return folder
