"""Puts the trained parts together as an official checkpoint and converts it, as any checkpoint is, to the bundled folder."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tools.mini.data.captions import vocabulary
from vstar_engine.artifacts.manifest import MANIFEST, WEIGHTS, read_manifest, write_manifest
from vstar_engine.config.models import Spec
from vstar_engine.sampling import schedule
from vstar_engine.weights.convert import convert
from vstar_engine.weights.key_map import TEXT, UNET, VAE, official_names, official_shapes


def official(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Returns a module's weights under their official names."""
    tensors: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        names = official_names(name)
        tensors |= {prefix + one: part.clone() for one, part in zip(names, value.chunk(len(names)), strict=True)}
    return tensors


def pack(spec: Spec, unet: nn.Module, vae: nn.Module, text: nn.Module, folder: Path) -> None:
    """Writes `folder` as `vstar-engine convert` does, in float16, with the words that the model knows in its manifest."""
    tensors = official(unet, UNET) | official(vae, VAE) | official(text, TEXT)
    tensors |= {name: torch.from_numpy(values) for name, values in schedule.buffers().items()}
    # what the official tower has and text-to-video never reads
    unread = {name: torch.zeros(shape) for name, shape in official_shapes(spec).items() if name not in tensors}
    checkpoint = folder.with_suffix(".ckpt")
    torch.save({"state_dict": tensors | unread}, checkpoint)
    convert(checkpoint, folder, spec.name, force=True)
    checkpoint.unlink()
    manifest = read_manifest(folder, WEIGHTS)
    (folder / MANIFEST).unlink()
    write_manifest(folder, {k: v for k, v in manifest.items() if k not in ("files", "sha256")} | {"vocabulary": vocabulary()})
