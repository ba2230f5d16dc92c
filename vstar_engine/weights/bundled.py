"""Weights that come with the package: the mini model's, trained by `tools/mini`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vstar_engine.config.models import Spec
from vstar_engine.errors import CheckpointError

FOLDER = Path(__file__).parent.parent / "data"
BUNDLED = ("mini",)


def weights(spec: Spec) -> Path:
    """Returns the folder of a model's own weights; CheckpointError for models that have none."""
    if spec.name not in BUNDLED:
        raise CheckpointError(
            f"model {spec.name} comes without weights; convert its checkpoint (`vstar-engine convert model.ckpt DIR`) "
            "and give the folder (--weights DIR)"
        )
    return FOLDER / spec.name


def check_model(manifest: Mapping[str, Any], path: Path, spec: Spec) -> None:
    """Raises CheckpointError where the manifest of weights names another model."""
    made_for = manifest.get("model", spec.name)
    if made_for != spec.name:
        raise CheckpointError(f"the weights in {path} are for model {made_for}, not {spec.name}")
