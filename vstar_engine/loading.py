"""Loads what a `ModelChoice` names: networks with weights in them."""

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.artifacts.source_hash import engine_hash
from vstar_engine.config import request_warnings
from vstar_engine.config.models import Spec
from vstar_engine.config.sampling import FP8
from vstar_engine.errors import CheckpointError
from vstar_engine.machine import malloc, threads
from vstar_engine.machine.device import device_named, dtype_named
from vstar_engine.networks import fp8
from vstar_engine.networks.appearance import Resampler
from vstar_engine.networks.denoiser import Denoiser
from vstar_engine.networks.image_encoder import ImageTower
from vstar_engine.networks.streaming_unet import streaming_of
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.networks.unet import UNet
from vstar_engine.networks.vae import Vae
from vstar_engine.prompting.tokenizer import tokenize
from vstar_engine.sampling.fp8_calibration import calibrate
from vstar_engine.weights import bundled, checkpoint, key_map
from vstar_engine.weights.lora import Lora, MergedWeights
from vstar_engine.weights.streaming_keys import IMAGE, RESAMPLER, StreamingWeights

from .backends import TENSORRT, backend_named
from .model_choice import ModelChoice

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """Networks with weights in them, and what is known of the weights.

    `weights` is the hash of their source, `path` where they lie, `origin` the id and commit of the Hub that they come from,
    and `unused` names the tensors that are not needed. `artifact` is the built engine that `denoiser` runs, None in eager.
    `vocabulary` has all words that the model knows, none where it may know any. `fp8` has the largest input that each layer had
    in calibration, where they multiply in FP8.
    """

    spec: Spec
    text: TextTower | None
    denoiser: Denoiser
    vae: Vae
    device: torch.device
    dtype: torch.dtype
    weights: str
    unused: list[str] = field(default_factory=list)
    text_hash: str | None = None
    vocabulary: Set[str] = frozenset()
    artifact: BuiltEngine | None = None
    path: Path | None = None
    loras: Sequence[Lora] = ()
    fp8: Mapping[str, float] | None = None
    origin: Mapping[str, Any] | None = None
    image: "ImageEncoder | None" = None


@dataclass(frozen=True)
class ImageEncoder:
    """What makes tokens of a streaming model's anchor frame."""

    tower: ImageTower
    resampler: Resampler


def check_machine(choice: ModelChoice) -> tuple[torch.device, torch.dtype]:
    """Returns the device and dtype of a choice; DeviceError where they cannot compute here, ValueError for an unknown dtype."""
    dtype = dtype_named(choice.dtype)
    device = device_named(choice.device, dtype)
    if choice.fp8:
        fp8.check(device, dtype)
    return device, dtype


def load_model(choice: ModelChoice, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Loads what a choice names onto a device that was checked; raises as `Engine.load` does."""
    choice = choice.located()
    spec, artifact = choice.spec, choice.engine
    tensors = open_weights(spec, choice.weights, choice.loras)
    if artifact is not None:
        here = backend_named(choice.backend).requirements(device, artifact.identity["options"])
        asked = {"weights_path": choice.weights, "loras": list(choice.loras)}
        artifact.check(asked, weights=tensors.fingerprint(), sources=engine_hash(), **here)
    if device.type == "cpu":
        malloc.keep_pages()
        threads.warn(torch.get_num_threads())
    with torch.device("meta"):
        vae = Vae(spec.vae, encoder=False)
    tower, unused = None, [name for name in tensors if name.startswith(key_map.TEXT)]
    if choice.text is not None:
        tower, unused = load_text(spec, tensors, device, dtype)
    unused += checkpoint.load(vae, tensors, key_map.VAE, device=device, dtype=dtype)
    denoiser = _denoiser(choice, tensors, device, dtype)
    image = None if spec.streaming is None else _image_encoder(spec, tensors, device, dtype)
    used = (key_map.UNET, key_map.VAE, key_map.TEXT, *((IMAGE, RESAMPLER) if image else ()))
    unused += [name for name in tensors if not name.startswith(used)]
    log.info("%s: %d tensors used, %d not needed", spec.name, len(tensors) - len(unused), len(unused))
    log.debug("not needed: %s", ", ".join(unused))
    return LoadedModel(
        spec,
        tower,
        denoiser,
        vae.eval().requires_grad_(False),
        device,
        dtype,
        weights=tensors.manifest.get("source", {}).get("sha256", tensors.path.name),
        unused=unused,
        text_hash=checkpoint.text_hash(tensors, spec.text),
        vocabulary=frozenset(tensors.manifest.get("vocabulary", ())),
        artifact=artifact,
        path=tensors.path,
        loras=tensors.loras if isinstance(tensors, MergedWeights) else (),
        fp8=_convert(denoiser, spec, tower, device) if choice.fp8 else None,
        origin=tensors.manifest.get("source", {}).get("hub"),
        image=image,
    )


def _image_encoder(spec: Spec, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> ImageEncoder:
    """Builds and fills a streaming model's image tower and resampler."""
    streaming = streaming_of(spec)
    with torch.device("meta"):
        tower = ImageTower(streaming.image)
        resampler = Resampler(spec.unet.context_dim, streaming.resampler, spec.unet.image_tokens)
    for module, prefix in ((tower, IMAGE), (resampler, RESAMPLER)):
        checkpoint.load(module, tensors, prefix, device=device, dtype=dtype)
    return ImageEncoder(tower.eval().requires_grad_(False), resampler.eval().requires_grad_(False))


def _denoiser(choice: ModelChoice, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> Any:
    """Returns the UNet in eager PyTorch, or in its built engine."""
    backend = backend_named(choice.backend)
    if choice.engine is not None:
        recording = {"graphs": choice.graphs} if choice.backend in TENSORRT else {}
        return backend.load(choice.engine, device=device, dtype=dtype, **recording)
    how = {"spatial_attention": choice.spatial_attention, "graphs": choice.graphs}
    return backend.load(choice.spec, tensors, device=device, dtype=dtype, **how)


@torch.inference_mode()
def _convert(unet: UNet, spec: Spec, tower: TextTower | None, device: torch.device) -> dict[str, float]:
    """Converts the UNet to FP8 and returns each layer's largest input in calibration."""
    assert tower is not None
    largest = calibrate(unet, spec, lambda prompts: tower(tokenize(prompts, spec.text).to(device)))
    fp8.convert(unet, largest)
    unet.forget_graphs()
    if device.type == "cpu":
        request_warnings.warn_once(f"{FP8} saves no time on a CPU; it shows the error that a GPU would make")
    return largest


def open_weights(spec: Spec, weights: str | Path | None, loras: Sequence[str] = ()) -> checkpoint.Weights | StreamingWeights:
    """Opens a folder of weights, or a model's own, and merges LoRAs; CheckpointError where they are damaged or do not fit."""
    tensors = checkpoint.Weights(weights or bundled.weights(spec))
    bundled.check_model(tensors.manifest, tensors.path, spec)
    if spec.streaming is not None:
        if loras:
            raise CheckpointError(f"LoRAs are merged into text-to-video models, and {spec.name} is none; leave them out")
        return StreamingWeights(tensors, spec)
    return MergedWeights(tensors, [Lora.parse(text, spec.unet) for text in loras]) if loras else tensors


def load_text(
    spec: Spec, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> tuple[TextTower, list[str]]:
    """Builds and fills the text tower alone; returns it with the names of the tensors it does not need."""
    with torch.device("meta"):
        tower = TextTower(spec.text)
    unused = checkpoint.load(tower, tensors, key_map.TEXT, device=device, dtype=dtype)
    return tower.eval().requires_grad_(False), unused
