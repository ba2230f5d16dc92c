"""A UNet alone made a whole model: its autoencoder and its text tower come from other weights, which are named."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from vstar_engine.config.models import Spec
from vstar_engine.errors import CheckpointError
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.networks.vae import Vae

from .bundled import stated_spec
from .checkpoint import Weights, check
from .diffusers_layout import LayoutTensors, Source
from .key_map import TEXT, VAE, module_shapes


def completed(spec: Spec, unet: LayoutTensors, source: Path, parts: str | None) -> tuple[Spec, LayoutTensors]:
    """Returns a model and its tensors: the UNet's, and those of the autoencoder and the text tower in a folder of weights.

    CheckpointError where no such folder is named, or where it does not hold them.
    """
    if parts is None:
        raise CheckpointError(f"{source} holds a UNet alone; say where its autoencoder and its text tower come from (--parts)")
    others, whole = Weights(parts), stated_spec(spec, parts)
    spec = replace(spec, vae=whole.vae, text=whole.text)
    with torch.device("meta"):
        modules = {VAE: Vae(spec.vae), TEXT: TextTower(spec.text)}
    sources = dict(unet.sources)
    for prefix, module in modules.items():
        check(module, others, prefix, parts)
        for name, shape in module_shapes(module).items():
            sources[prefix + name] = Source((partial(others.__getitem__, prefix + name),), shape)
    return spec, LayoutTensors(sources)
