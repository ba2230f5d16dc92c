"""Weights that come with the package: the mini model's, trained by `tools/mini`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vstar_engine.artifacts.manifest import read_stated
from vstar_engine.config.models import Spec, with_networks
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


def stated_spec(spec: Spec, path: str | Path | None) -> Spec:
    """Returns a model with the networks that a folder of weights states; CheckpointError where they make no sense."""
    stated = None if path is None else read_stated(Path(path)).get("networks")
    if stated is None:
        return spec
    try:
        return with_networks(spec, stated)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def check_model(manifest: Mapping[str, Any], path: Path, spec: Spec) -> None:
    """Raises CheckpointError where the manifest of weights names another model."""
    made_for = manifest.get("model", spec.name)
    if made_for != spec.name:
        raise CheckpointError(f"the weights in {path} are for model {made_for}, not {spec.name}")
