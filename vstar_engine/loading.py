"""A choice becomes networks with weights in them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vstar_engine.config.models import Spec
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.weights import bundled, checkpoint, key_map
from vstar_engine.weights.lora import Adapted, Lora


def open_weights(spec: Spec, weights: str | Path | None, loras: Sequence[str] = ()) -> checkpoint.Weights:
    """Opens a folder of weights, or a model's own, and merges LoRAs; CheckpointError where they are damaged or do not fit."""
    tensors = checkpoint.Weights(weights or bundled.weights(spec))
    bundled.check_model(tensors.manifest, tensors.path, spec)
    return Adapted(tensors, [Lora.parse(text, spec.unet) for text in loras]) if loras else tensors


def load_text(
    spec: Spec, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> tuple[TextTower, list[str]]:
    """Builds and fills the text tower alone; gives it with the names of the tensors it does not need."""
    with torch.device("meta"):
        tower = TextTower(spec.text)
    unused = checkpoint.load(tower, tensors, key_map.TEXT, device=device, dtype=dtype)
    return tower.eval().requires_grad_(False), unused


def _under(tensors: Mapping[str, Tensor], prefix: str) -> list[str]:
    return [name for name in tensors if name.startswith(prefix)]
