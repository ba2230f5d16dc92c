"""Weights that come with the package: the mini model's, trained by `tools/mini`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vstar_engine.artifacts.manifest import read_stated
from vstar_engine.config.models import Spec, with_networks
from vstar_engine.errors import CheckpointError

from .diffusers_config import unet_spec, vae_spec
from .diffusers_files import CONFIG, INDEX, UNET, VAE

FOLDER = Path(__file__).parent.parent / "data"
BUNDLED = ("mini",)


def weights(spec: Spec) -> Path:
    """Returns the folder of a model's own weights; CheckpointError for models that have none."""
    if spec.name not in BUNDLED:
        raise CheckpointError(
            f"model {spec.name} comes without weights; fetch them (`vstar-engine pull {spec.name}`), or give a checkpoint, a "
            "folder or a model's id on the Hub (--weights)"
        )
    return FOLDER / spec.name


def stated_spec(spec: Spec, path: str | Path | None) -> Spec:
    """Returns a model with the networks that a folder of weights states, of a diffusers folder the UNet and the autoencoder.

    Raises CheckpointError where they make no sense, or are not computed here.
    """
    stated = None if path is None else read_stated(Path(path)).get("networks")
    if stated is None:
        return spec if path is None or not (Path(path) / INDEX).is_file() else _of_layout(spec, Path(path))
    try:
        return with_networks(spec, stated)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _of_layout(spec: Spec, folder: Path) -> Spec:
    return replace(spec, unet=unet_spec(folder / UNET / CONFIG), vae=vae_spec(folder / VAE / CONFIG))


def check_model(manifest: Mapping[str, Any], path: Path, spec: Spec) -> None:
    """Raises CheckpointError where the manifest of weights names another model."""
    made_for = manifest.get("model", spec.name)
    if made_for != spec.name:
        raise CheckpointError(f"the weights in {path} are for model {made_for}, not {spec.name}")
