"""Names: the official checkpoint's keys and shapes, and the parameters of ours that hold them."""

import torch
from torch import nn

from vstar_engine.config.models import Spec
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.networks.unet import UNet
from vstar_engine.networks.vae import Vae
from vstar_engine.sampling import schedule

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."


# our part of a name -> the official parts whose tensors it holds, stacked along the first axis
TABLE = {
    "temporal_conv": ("temopral_conv",),
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
}


def official_names(name: str) -> list[str]:
    """Returns the official names whose tensors make up our parameter `name`."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part in TABLE:
            return [".".join([*parts[:i], official, *parts[i + 1 :]]) for official in TABLE[part]]
    return [name]


def module_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Lists the official names and shapes of a module's parameters."""
    shapes = {}
    for name, parameter in module.named_parameters():
        names = official_names(name)
        for official in names:
            shapes[official] = (parameter.shape[0] // len(names), *parameter.shape[1:]) if parameter.dim() else ()
    return shapes


def official_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Lists every key and shape of a model's official checkpoint (2039 for VideoCrafter2)."""
    with torch.device("meta"):
        unet, vae, text = UNet(spec.unet), Vae(spec.vae), TextTower(spec.text)
    first, last = "transformer.resblocks.0.", f"transformer.resblocks.{spec.text.layers - 1}."
    tower = module_shapes(text)
    tower |= {last + name.removeprefix(first): shape for name, shape in tower.items() if name.startswith(first)}
    tower |= {"text_projection": (spec.text.width, spec.text.width), "logit_scale": ()}
    shapes: dict[str, tuple[int, ...]] = {name: values.shape for name, values in schedule.buffers().items()}
    for prefix, part in ((UNET, module_shapes(unet)), (VAE, module_shapes(vae)), (TEXT, tower)):
        shapes |= {prefix + name: shape for name, shape in part.items()}
    return shapes
