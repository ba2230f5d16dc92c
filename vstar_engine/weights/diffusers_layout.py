"""A diffusers folder read as a model: its networks, its noise, and its tensors under the official names."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from vstar_engine.artifacts.file_kind import SAFETENSORS, weight_kind
from vstar_engine.artifacts.manifest import open_tensors
from vstar_engine.config.models import Spec
from vstar_engine.errors import CheckpointError
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.networks.unet import UNet
from vstar_engine.networks.vae import Vae

from . import diffusers_files as files
from . import diffusers_names as names
from . import key_map
from .checkpoint import check_keys
from .diffusers_config import Settings, noise_spec, text_spec, unet_spec, vae_spec
from .diffusers_tokenizer import padding_token
from .pickle_file import read_pickle
from .wrappers import state_dict_in

PIPELINES = ("TextToVideoSDPipeline", "VideoToVideoSDPipeline")
# each part of a pipeline and the classes that are read
CLASSES = {
    files.UNET: ("UNet3DConditionModel", "UNet3DVideoCrafterConditionModel"),
    files.VAE: ("AutoencoderKL",),
    files.TEXT: ("CLIPTextModel",),
    files.TOKENIZER: ("CLIPTokenizer", "CLIPTokenizerFast"),
}


@dataclass(frozen=True)
class Source:
    """The tensors that one official tensor is made of, stacked along the first axis, and its shape."""

    parts: tuple[Callable[[], Tensor], ...]
    shape: tuple[int, ...]


class LayoutTensors(Mapping[str, Tensor]):
    """The tensors of a diffusers folder under the official names, read when they are asked for."""

    def __init__(self, sources: Mapping[str, Source]):
        self.sources = sources

    def __getitem__(self, name: str) -> Tensor:
        source = self.sources[name]
        parts = [read() for read in source.parts]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(source.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


def read_spec(folder: Path, base: Spec) -> Spec:
    """Returns the model `base` with a folder's networks and noise; CheckpointError for what is not computed here."""
    if not files.is_pipeline(folder):
        return replace(base, unet=unet_spec(folder / files.CONFIG))
    _check_classes(Settings(folder / files.INDEX))
    return replace(
        base,
        unet=unet_spec(folder / files.UNET / files.CONFIG),
        vae=vae_spec(folder / files.VAE / files.CONFIG),
        text=text_spec(folder / files.TEXT / files.CONFIG, padding_token(folder / files.TOKENIZER)),
        noise=noise_spec(folder / files.SCHEDULE / files.SCHEDULER),
    )


def _check_classes(index: Settings) -> None:
    """Raises CheckpointError for a pipeline that is made of other parts than text to video has here."""
    if index.class_name not in PIPELINES:
        raise CheckpointError(f"{index.path} is a {index.class_name}; {' and '.join(PIPELINES)} are read")
    for part in files.PARTS:
        said = index.pop(part, None)
        kind = said[1] if isinstance(said, list) and len(said) == 2 else None
        if kind is None or kind not in CLASSES.get(part, (kind,)):
            wanted = " or ".join(CLASSES.get(part, ("any",)))
            raise CheckpointError(f"{index.path}: {part} must be a {wanted}, got {kind}")
    more = [name for name, said in index.left().items() if isinstance(said, list) and any(said)]
    if more:
        raise CheckpointError(f"{index.path} has parts that are not computed here: {', '.join(more)}")


def open_layout(folder: Path, base: Spec) -> tuple[Spec, LayoutTensors]:
    """Opens a folder: the model that it is, and all its tensors under their official names.

    Every tensor of a file is used or known to be unneeded, and every parameter is filled; CheckpointError says what is not so.
    """
    spec = read_spec(folder, base)
    if spec.unet.fps_condition != base.unet.fps_condition:
        ours, its = (
            "has a frame-rate condition" if one else "has none" for one in (base.unet.fps_condition, spec.unet.fps_condition)
        )
        raise CheckpointError(f"model {base.name} {ours}, and {folder} {its}: it is another model's (--model)")
    whole = files.is_pipeline(folder)
    with torch.device("meta"):
        unet, vae, tower = UNet(spec.unet), Vae(spec.vae), TextTower(spec.text)
    whole = files.is_pipeline(folder)
    held = PartFiles(folder / files.UNET if whole else folder, files.UNET)
    parts = {name: (theirs,) for name, theirs in names.unet_names(spec.unet, key_map.module_shapes(unet)).items()}
    sources = _sources(held, key_map.UNET, parts, unet)
    if whole:
        held = PartFiles(folder / files.VAE, files.VAE)
        sources |= _sources(held, key_map.VAE, _vae_parts(spec, vae, held), vae)
        held = PartFiles(folder / files.TEXT, files.TEXT)
        sources |= _sources(held, key_map.TEXT, {name: names.text_names(name) for name in key_map.module_shapes(tower)}, tower)
    return spec, LayoutTensors(sources)


class PartFiles:
    """The tensors of one part's files: name -> a function that reads it, and its shape."""

    def __init__(self, folder: Path, part: str):
        self.folder = folder
        self.read: dict[str, Callable[[], Tensor]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in files.weight_files(folder, part):
            self._add(path)
        if part == files.TEXT:
            self.read = {name.removeprefix(names.TEXT_PREFIX): read for name, read in self.read.items()}
            self.shapes = {name.removeprefix(names.TEXT_PREFIX): shape for name, shape in self.shapes.items()}
            for name in names.TEXT_UNNEEDED:
                self.read.pop(name, None)

    def _add(self, path: Path) -> None:
        if weight_kind(path, "weights") == SAFETENSORS:
            held = open_tensors(path, "pt")
            for name in list(held.keys()):
                self.read[name] = partial(held.get_tensor, name)
                self.shapes[name] = tuple(held.get_slice(name).get_shape())
            return
        tensors = state_dict_in(read_pickle(path), str(path))
        for name, tensor in tensors.items():
            self.read[name], self.shapes[name] = partial(tensors.__getitem__, name), tuple(tensor.shape)


def _vae_parts(spec: Spec, vae: nn.Module, held: PartFiles) -> dict[str, tuple[str, ...]]:
    """Returns the names of an autoencoder's tensors, today's or those of diffusers 0.15."""
    today = {official: names.vae_name(spec.vae, official) for official in key_map.module_shapes(vae)}
    old = any(names.old_vae_name(name) in held.read for name in today.values() if names.old_vae_name(name) != name)
    return {official: (names.old_vae_name(name) if old else name,) for official, name in today.items()}


def _sources(held: PartFiles, prefix: str, parts: Mapping[str, tuple[str, ...]], module: nn.Module) -> dict[str, Source]:
    """Returns where each official tensor of a network lies; CheckpointError unless names and shapes agree exactly."""
    shapes = key_map.module_shapes(module)
    wanted: dict[str, tuple[int, ...]] = {}
    for official, made in parts.items():
        wanted |= dict.fromkeys(made, (shapes[official][0] // len(made), *shapes[official][1:]))
    found = {}
    for name in held.read:
        # a linear layer on one side is a convolution over one cell on the other
        shape, right = held.shapes[name], wanted.get(name)
        found[name] = right if right is not None and _bare(shape) == _bare(right) else shape
    check_keys(found, wanted, str(held.folder))
    return {
        prefix + official: Source(tuple(held.read[name] for name in made), shapes[official]) for official, made in parts.items()
    }


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a shape without the ones at its end, which a matrix does not have."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
