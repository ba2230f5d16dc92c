"""Weights that come with the package: the mini model's, trained by `tools/mini`."""

from pathlib import Path

from .config import Spec
from .errors import CheckpointError

FOLDER = Path(__file__).parent / "data"
BUNDLED = ("mini",)


def weights(spec: Spec) -> Path:
    """Gives the folder of a model's own weights; CheckpointError for models that have none."""
    if spec.name not in BUNDLED:
        raise CheckpointError(
            f"model {spec.name} comes without weights; convert its checkpoint (`vstar-engine convert model.ckpt DIR`) "
            "and give the folder (--weights DIR)"
        )
    return FOLDER / spec.name
