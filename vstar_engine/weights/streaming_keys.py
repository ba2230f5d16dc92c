"""The names of StreamingT2V's checkpoint, and the official names of a text-to-video model that our networks are filled by."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vstar_engine.config.models import Spec, UNetSpec
from vstar_engine.networks.appearance import Resampler
from vstar_engine.networks.image_encoder import ImageTower
from vstar_engine.networks.streaming_unet import StreamingUNet, streaming_of
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.networks.vae import Vae

from .checkpoint import Weights, check_keys
from .key_map import TEXT, UNET, VAE, module_shapes

IMAGE, RESAMPLER = "image_encoder.model.visual.", "resampler."
# what the image tower's file has besides it: OpenCLIP's text tower without its blocks
LEFT_OVER = "image_encoder.model."
# a name that no other model's checkpoint has
STREAMING_KEY = "base_model.cross_attention_merger_mid_block.temporal_transformer.proj_in.weight"
RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
KINDS = ("resnets", "attentions", "temp_attentions")
ENDS = {"out.0": "conv_norm_out", "out.2": "conv_out", "time_embed.0": "time_embedding.linear_1"}
ENDS |= {"time_embed.2": "time_embedding.linear_2", "init_attn.0": "transformer_in", "input_blocks.0.0": "conv_in"}
TEXT_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
TEXT_BLOCK |= {"attn.out_proj": "self_attn.out_proj"}
TEXT_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


@dataclass(frozen=True)
class Stored:
    """The tensors of a checkpoint that make up an official one, stacked along the first axis.

    `shape` is that of each, `official` that of the whole under its official name; they may differ in trailing ones.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    official: tuple[int, ...]


def unet_name(name: str, spec: UNetSpec) -> str:
    """Returns the published name of a UNet's parameter for its official name."""
    for official, published in ENDS.items():
        if name.startswith(f"{official}."):
            return published + name.removeprefix(official)
    row = spec.num_res_blocks + 1
    part, at, *inner = name.split(".")
    if part == "middle_block":
        kind, i = (("resnets", 0), ("attentions", 0), ("temp_attentions", 0), ("resnets", 1))[int(at)]
        return _layer_name(f"mid_block.{{}}.{i}", kind, ".".join(inner))
    number, rest = inner[0], ".".join(inner[1:])
    level, i = divmod(int(at) - (part == "input_blocks"), row)
    block = f"{'down' if part == 'input_blocks' else 'up'}_blocks.{level}"
    if part == "input_blocks" and i == spec.num_res_blocks:
        return f"{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    if rest.startswith("conv."):
        return f"{block}.upsamplers.0.{rest}"
    return _layer_name(f"{block}.{{}}.{i}", KINDS[int(number)], rest)


def _layer_name(place: str, kind: str, rest: str) -> str:
    """Returns the published name of a parameter `rest` of a block's layer; `place` is the layer's, less its kind."""
    if rest.startswith("temopral_conv."):
        return f"{place.format('temp_convs')}.{rest.removeprefix('temopral_conv.')}"
    if kind == "resnets":
        layer, _, leaf = rest.rpartition(".")
        rest = f"{RESIDUAL[layer]}.{leaf}"
    return f"{place.format(kind)}.{rest}"


def vae_name(name: str, levels: int) -> str:
    """Returns the published name of an autoencoder's parameter for its official name."""
    side, _, rest = name.partition(".")
    if side not in ("encoder", "decoder"):
        return name
    part, *inner = rest.split(".")
    if part == "norm_out":
        return f"{side}.conv_norm_out.{inner[0]}"
    if part == "mid" and inner[0] == "attn_1":
        return f"{side}.mid_block.attentions.0.{VAE_ATTENTION[inner[1]]}.{inner[2]}"
    if part == "mid":
        return f"{side}.mid_block.resnets.{int(inner[0][-1]) - 1}.{'.'.join(inner[1:])}"
    if part not in ("down", "up"):
        return name
    level, kind, *inner = inner
    place = f"{side}.{part}_blocks.{level if part == 'down' else levels - 1 - int(level)}"
    if kind in ("downsample", "upsample"):
        return f"{place}.{kind}rs.0.{'.'.join(inner)}"
    return f"{place}.resnets.{'.'.join(inner).replace('nin_shortcut', 'conv_shortcut')}"


def text_names(name: str) -> list[str]:
    """Returns the published names of a text tower's parameter for its official name: q, k and v stand apart there."""
    if name in TEXT_ENDS:
        return [TEXT_ENDS[name]]
    _, _, block, rest = name.split(".", 3)
    place = f"encoder.layers.{block}"
    if rest.startswith("attn.in_proj_"):
        return [f"{place}.self_attn.{one}_proj.{rest.removeprefix('attn.in_proj_')}" for one in "qkv"]
    layer, _, leaf = rest.rpartition(".")
    return [f"{place}.{TEXT_BLOCK[layer]}.{leaf}"]


def _network_name(name: str, spec: UNetSpec) -> str:
    """Returns the published name of a parameter of `StreamingUNet`."""
    part, _, rest = name.partition(".")
    if part == "base":
        return f"base_model.{unet_name(rest, spec)}"
    if part == "fusers":
        at, _, rest = rest.partition(".")
        return f"base_model.cross_attention_merger_down_blocks.{at}.temporal_transformer.{rest}"
    if part == "middle_fuser":
        return f"base_model.cross_attention_merger_mid_block.temporal_transformer.{rest}"
    if rest.startswith("pixel_encoder."):
        return f"unet.controlnet_cond_embedding.{rest.removeprefix('pixel_encoder.')}"
    return f"unet.{unet_name(rest, spec)}"


def _without_ones(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a weight's published shape: what is a matrix there may be a 1x1 convolution here."""
    linear = "transformer_in.proj_" in name or (".mid_block.attentions." in name and name.startswith("vae."))
    return shape[:2] if linear else shape


def stored_names(spec: Spec) -> dict[str, Stored]:
    """Maps the official name of every tensor of a streaming model to those of the published checkpoint."""
    streaming, unet = streaming_of(spec), spec.unet
    with torch.device("meta"):
        parts: list[tuple[str, nn.Module, Any]] = [
            (UNET, StreamingUNet(spec), lambda name: [_network_name(name, unet)]),
            (VAE, Vae(spec.vae), lambda name: [f"vae.{vae_name(name, len(spec.vae.channel_mult))}"]),
            (TEXT, TextTower(spec.text), lambda name: [f"text_encoder.text_model.{one}" for one in text_names(name)]),
            (IMAGE, ImageTower(streaming.image), lambda name: [IMAGE + name]),
            (RESAMPLER, Resampler(unet.context_dim, streaming.resampler, unet.image_tokens), lambda name: [RESAMPLER + name]),
        ]
    found = {}
    for prefix, module, published in parts:
        for name, shape in module_shapes(module).items():
            names = published(name)
            each = (shape[0] // len(names), *shape[1:]) if shape else ()
            found[prefix + name] = Stored(tuple(names), _without_ones(names[0], each), shape)
    return found


def published_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Lists every key and shape of a streaming model's checkpoint (3407 for streaming-t2v)."""
    shapes = {name: stored.shape for stored in stored_names(spec).values() for name in stored.names}
    width, text = spec.text.width, spec.text
    left = {"positional_embedding": (text.context_length, width), "text_projection": (width, width), "logit_scale": ()}
    left |= {"token_embedding.weight": (text.vocab_size, width), "ln_final.weight": (width,), "ln_final.bias": (width,)}
    return shapes | {LEFT_OVER + name: shape for name, shape in left.items()}


class OfficialNames(Mapping[str, Tensor]):
    """A published streaming checkpoint's tensors under official names, read when they are asked for; others keep theirs."""

    def __init__(self, tensors: Mapping[str, Any], spec: Spec):
        self.tensors = tensors
        named = {official: stored for official, stored in stored_names(spec).items() if stored.names[0] in tensors}
        used = {name for stored in named.values() for name in stored.names}
        self.stored: dict[str, Stored | None] = {**named, **{name: None for name in tensors if name not in used}}

    def __getitem__(self, name: str) -> Tensor:
        stored = self.stored[name]
        if stored is None:
            return torch.as_tensor(self.tensors[name])
        parts = [torch.as_tensor(self.tensors[one]) for one in stored.names]
        for one, part in zip(stored.names, parts, strict=True):
            check_keys({one: tuple(part.shape)}, {one: stored.shape}, "the checkpoint")
        return torch.cat(parts).reshape(stored.official) if len(parts) > 1 else parts[0].reshape(stored.official)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


class StreamingWeights(OfficialNames):
    """A converted folder of a streaming model under official names; `manifest` and `path` are the folder's."""

    def __init__(self, tensors: Weights, spec: Spec):
        super().__init__(tensors, spec)
        self.manifest, self.path, self.fingerprint = tensors.manifest, tensors.path, tensors.fingerprint
