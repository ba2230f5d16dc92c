"""LoRA files (arXiv 2106.09685) for the UNet: read in kohya's and diffusers' layouts and merged into weights as they load.

A pickled one is made one of these files first (`lora_child.py`).

A layer's weight W becomes W + strength * alpha / rank * up @ down, in float32, then cast once. Nothing is ever subtracted:
to take a LoRA out, the weights are read again, so that what comes back is exactly what was there.
"""

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from vstar_engine.artifacts.file_kind import SAFETENSORS, weight_kind
from vstar_engine.artifacts.files import digest_of, sha256
from vstar_engine.config.models import UNetSpec
from vstar_engine.errors import CheckpointError
from vstar_engine.networks.unet import UNet

from .checkpoint import Weights, check_dtype, check_finite, listing
from .diffusers_names import unet_names
from .key_map import UNET, module_shapes
from .lora_configuration import BESIDE, TEXT, Configuration, configuration_of
from .wrappers import without_wrappers

log = logging.getLogger(__name__)

# how a layer's parts are called: kohya, PEFT, and diffusers' two older ways
PART = re.compile(
    r"(?P<layer>.+?)(?:"
    r"\.lora_(?P<a>down|up|A|B)(?:\.(?P<adapter>.+))?\.weight|[._]lora(?:_linear_layer)?\.(?P<b>down|up)\.weight|\.(?P<c>alpha))"
)
PARTS = {"A": "down", "B": "up"}
# what trainers call the denoiser, and what holds it
PREFIXES = (
    *("base_model.model.", "model.", "diffusion_model.", "pipe.", "pipeline."),
    *("unet.", "transformer.", "denoiser.", "lora_unet_", "lora_transformer_", "lycoris_"),
)
# what other tensors belong to; the first that fits is named
OTHERS = {
    r"modules_to_save": "whole layers (modules_to_save)",
    r"hada_w\d|lokr_w\d|dora_scale|lora_magnitude|oft_|glora|ia3": "LoHa, LoKr, DoRA and other kinds",
    r"\.diff(_b)?$|\.set_weight$": "differences of whole tensors (.diff)",
    r"bias$": "biases",
    r"lora_embedding": "embeddings",
}
# what a guidance scale that a LoRA's UNet was told adds to the embedded timestep, (model_channels,)
GUIDED = "guided"
IN_FOLDERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
# letters of a layer's name that no other network has by chance
MANY = 20


@dataclass(frozen=True)
class Layer:
    """One layer's change: up (out, rank, ...) @ down (rank, in, ...) times `scale`, which is alpha / rank."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self, shape: torch.Size) -> Tensor:
        """Returns the change of a weight of `shape`, float32."""
        return (self.scale * (self.up.flatten(1).float() @ self.down.flatten(1).float())).reshape(shape)


@dataclass(frozen=True)
class Lora:
    """A LoRA file read for one UNet: its changes by official layer name."""

    path: Path
    strength: float
    layers: Mapping[str, Layer] = field(repr=False)
    guided: Tensor | None = field(default=None, repr=False)

    @cached_property
    def sha256(self) -> str:
        return sha256(self.path)

    def __str__(self) -> str:
        return f"{self.path}:{self.strength:g}"

    @staticmethod
    def parse(text: str, spec: UNetSpec) -> "Lora":
        """Reads FILE or FILE:STRENGTH; ValueError for a strength that is no finite number."""
        name, colon, strength = text.rpartition(":")
        if not colon or Path(text).exists():
            return Lora.read(text, spec)
        try:
            amount = float(strength)
        except ValueError:
            amount = math.nan
        if not math.isfinite(amount):
            raise ValueError(f"a LoRA is FILE or FILE:STRENGTH with a finite strength, got {text!r}")
        return Lora.read(name, spec, amount)

    @staticmethod
    def read(path: str | Path, spec: UNetSpec, strength: float = 1.0) -> "Lora":
        """Reads a safetensors file; layers are named as in the official checkpoint or as in diffusers' image UNets.

        Raises CheckpointError for a file that is damaged, of another kind (LoHa, LoKr, DoRA ...) or made for another network.
        """
        path = _file_in(Path(path).absolute())
        if weight_kind(path, "LoRA") != SAFETENSORS:
            raise CheckpointError(
                f"{path} is in PyTorch's format, not safetensors; make such a file of it: "
                f"vstar-engine convert {path.name} {path.stem}.safetensors"
            )
        try:
            tensors = load_file(path)
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file ({error})") from error
        return Lora.of(path, tensors, metadata, spec, strength)

    @staticmethod
    def of(
        path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str], spec: UNetSpec, strength: float = 1.0
    ) -> "Lora":
        """Places the tensors of a LoRA on the layers of one UNet; CheckpointError as in `read`."""
        configured = configuration_of(path, metadata)
        guided = tensors.pop(GUIDED, None)
        if guided is not None:
            if guided.shape != (spec.model_channels,):
                raise CheckpointError(f"{path}: {GUIDED} must have {spec.model_channels} values, got {tuple(guided.shape)}")
            check_values(f"{path}: {GUIDED}", guided)
        shapes = layer_shapes(spec)
        known = {name.replace(".", "_"): official for name, official in names(spec, shapes).items()}
        parts: dict[str, dict[str, tuple[str, Tensor]]] = {}
        text, strange = [], []
        adapters = {found["adapter"] for key in tensors if (found := PART.fullmatch(key))} - {None}
        if len(adapters) > 1:
            raise CheckpointError(
                f"{path} holds {len(adapters)} adapters, {', '.join(sorted(adapters))}; save one of them alone"
            )
        for key, tensor in tensors.items():
            found = PART.fullmatch(key)
            if TEXT.match(key):
                text.append(key)
            elif found is None:
                strange.append(key)
            else:
                part, name = found["a"] or found["b"] or found["c"], bare(found["layer"])
                layer = known.get(name, name)
                first, _ = parts.setdefault(layer, {}).setdefault(PARTS.get(part, part), (key, tensor))
                if first != key:
                    raise CheckpointError(f"{path} changes layer {layer} twice, by {first} and by {key}; leave one of them in")
        if strange:
            raise CheckpointError(
                f"{path} holds {len(strange)} tensors that no plain LoRA has ({listing(strange)}): {_reason(strange)} are not "
                "read; save it as a LoRA with down, up and alpha"
            )
        _check_names(path, [layer for layer in parts if layer not in shapes], len(parts), known)
        layers = {name: _layer(path, name, layer, shapes[name], configured) for name, layer in parts.items()}
        if not layers:
            raise CheckpointError(f"{path} changes no layer of the UNet{'; it is for a text tower' if text else ''}")
        if text:
            log.warning("%s also has %d tensors for a text tower (%s); the text tower stays as it is", path, len(text), text[0])
        unscaled = sum("alpha" not in layer for layer in parts.values())
        # one that `convert` made of a list of matrices never has an alpha
        if configured.alpha is None and unscaled and guided is None:
            log.warning(
                "%s: %d of %d layers have no alpha, in the file or beside it: their rank is taken for it; "
                "where another was trained with, give it as lora_alpha in %s beside the file",
                *(path, unscaled, len(parts), BESIDE),
            )
        return Lora(path, float(strength), layers, guided)


def bare(layer: str) -> str:
    """Returns a layer's name without the prefixes of the formats and with underscores for dots."""
    layer = without_wrappers(layer)
    while prefix := next((prefix for prefix in PREFIXES if layer.startswith(prefix)), None):
        layer = layer.removeprefix(prefix)
    # diffusers' attention processors say to_out for to_out.0
    return re.sub(r"\bto_out$", "to_out.0", layer.replace(".processor", "")).replace(".", "_")


def layer_shapes(spec: UNetSpec) -> dict[str, tuple[int, ...]]:
    """Returns the official names of the layers with a matrix or a kernel, and its shape."""
    with torch.device("meta"):
        shapes = module_shapes(UNet(spec))
    return {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) > 1}


def names(spec: UNetSpec, layers: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Returns every name of a layer -> the official one: itself, and diffusers' of the 3-D and the image UNet."""
    return {layer: layer for layer in layers} | {name: layer for layer, name in unet_names(spec, layers).items()}


def _file_in(path: Path) -> Path:
    """Returns a file, or a folder's one LoRA as PEFT and diffusers name it."""
    if not path.exists():
        raise CheckpointError(f"there is no LoRA at {path}")
    if not path.is_dir():
        return path
    found = [path / name for name in IN_FOLDERS if (path / name).is_file()]
    if len(found) != 1:
        raise CheckpointError(f"{path} is a folder with {len(found) or 'none'} of {', '.join(IN_FOLDERS)} in it; give a file")
    return found[0]


def _reason(strange: Sequence[str]) -> str:
    found = [reason for pattern, reason in OTHERS.items() if any(re.search(pattern, key) for key in strange)]
    return " and ".join(found) or "such tensors"


def _check_names(path: Path, unknown: list[str], count: int, known: Mapping[str, str]) -> None:
    if not unknown:
        return
    before = {name.removesuffix(end) for name in unknown for end in known if name.endswith(f"_{end}") and len(end) > MANY}
    prefix = min(before, key=len, default="")
    told = f", as if {prefix}* stood before each: take that off its names" if prefix and len(unknown) == count else ""
    expected = [name for name in known if re.fullmatch(r"(input|down)_blocks_.*_attn1_to_q", name)]
    raise CheckpointError(
        f"{path} does not fit this UNet: {len(unknown)} of its {count} layers are unknown ({listing(unknown)}){told}; expected "
        f"layers such as {expected[0]} or {expected[-1]}"
    )


def check_values(name: str, tensor: Tensor) -> None:
    """Raises CheckpointError for a tensor that is empty, of a dtype that nothing is computed in, or not finite."""
    check_dtype(name, tensor)
    if tensor.numel() == 0:
        raise CheckpointError(f"{name} is {tuple(tensor.shape)}, which is empty; a LoRA has a rank of 1 or more")
    check_finite(name, tensor)


def _alpha(path: Path, key: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or tensor.is_complex() or not math.isfinite(tensor.item()):
        got = tensor.item() if tensor.numel() == 1 else f"{tensor.numel()} values"
        raise CheckpointError(f"{path}: {key} must be one finite number, got {got}")
    return float(tensor)


def _layer(
    path: Path,
    name: str,
    parts: Mapping[str, tuple[str, Tensor]],
    shape: tuple[int, ...],
    configured: Configuration,
) -> Layer:
    """Makes a layer of its parts, each a key and its tensor; the configured alpha counts where it has none of its own."""
    if not {"down", "up"} <= parts.keys():
        raise CheckpointError(f"{path} has only {', '.join(sorted(parts))} of layer {name}; down and up are needed")
    for key, tensor in (parts["down"], parts["up"]):
        if tensor.dim() < 2:
            raise CheckpointError(f"{path}: {key} is {tuple(tensor.shape)}; a matrix or a kernel is needed")
        check_values(f"{path}: {key}", tensor)
    down, up = parts["down"][1], parts["up"][1]
    rank, size = down.shape[0], torch.Size(shape).numel()
    if up.shape[1] != rank or up.shape[0] != shape[0] or up[:, 0].numel() != shape[0]:
        raise CheckpointError(
            f"{path}: layer {name} has up {tuple(up.shape)} and down {tuple(down.shape)}, which do not multiply"
        )
    if shape[0] * down[0].numel() != size:
        raise CheckpointError(
            f"{path}: layer {name} changes {up.shape[0]}x{down[0].numel()} where the weight is {tuple(shape)}"
        )
    own = _alpha(path, *parts["alpha"]) if "alpha" in parts else None
    return Layer(down, up, configured.scale(path, name, rank, own))


class MergedWeights(Weights):
    """Weights with LoRAs merged in as they are read; a layer that several change gets the sum of their changes."""

    def __init__(self, weights: Weights, loras: Sequence[Lora]):
        self.weights, self.loras = weights, tuple(loras)
        self.path, self.manifest = weights.path, weights.manifest

    def __getitem__(self, name: str) -> Tensor:
        tensor, layer = self.weights[name], name.removeprefix(UNET).removesuffix(".weight")
        for lora in self.loras if name == f"{UNET}{layer}.weight" else ():
            if layer in lora.layers:
                tensor = tensor.float() + lora.strength * lora.layers[layer].delta(tensor.shape)
        if name == f"{UNET}time_embed.0.bias":
            # what is added before a linear layer adds the layer's product with it behind
            for added in (lora.strength * lora.guided.float() for lora in self.loras if lora.guided is not None):
                tensor = tensor.float() + self[f"{UNET}time_embed.0.weight"].float() @ added
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def fingerprint(self) -> str:
        """Names the merged tensors by the weights', the files' and the strengths."""
        return digest_of([self.weights.fingerprint(), [[lora.sha256, lora.strength] for lora in self.loras]])
