"""The official configuration's names read as our specifications."""

from collections.abc import Mapping
from typing import Any

from vstar_engine.config.models import TextSpec, UNetSpec, VaeSpec

_UNET_FIXED = {
    "temporal_attention": True,
    "temporal_selfatt_only": True,
    "use_relative_position": False,
    "use_causal_attention": False,
    "resblock_updown": False,
    "use_scale_shift_norm": False,
    "conv_resample": True,
    "dims": 2,
}


_UNET_IRRELEVANT = {"use_checkpoint", "temporal_length", "dropout", "use_image_attention", "use_fp16"}


_VAE_IRRELEVANT = {"resolution", "dropout", "double_z"}


def spec_from_official(params: Mapping[str, Any]) -> Any:
    """Reads official configuration names: a UNet's give a UNetSpec, a first stage's ddconfig (with `embed_dim` and
    `scale_factor` if known) a VaeSpec, an OpenCLIP text configuration a TextSpec.

    Raises ValueError for a setting this network does not have, so that nothing is ignored in silence.
    """
    given = dict(params)
    if "model_channels" in given:
        return _unet_spec(given)
    if "ch_mult" in given:
        return _vae_spec(given)
    if "vocab_size" in given:
        own = {name: given[name] for name in ("tokenizer", "pad") if name in given}
        return TextSpec(**{name: given[name] for name in ("width", "heads", "layers", "vocab_size", "context_length")}, **own)
    raise ValueError(f"neither a UNet's, an autoencoder's nor a text tower's configuration: {', '.join(given)}")


def _unet_spec(given: dict[str, Any]) -> UNetSpec:
    for name, value in _UNET_FIXED.items():
        got = given.pop(name, value)
        if got != value:
            raise ValueError(f"the UNet configuration needs {name} = {value}, got {got}")
    mult = tuple(given.pop("channel_mult"))
    factors = set(given.pop("attention_resolutions"))
    spec = UNetSpec(
        model_channels=given.pop("model_channels"),
        channel_mult=mult,
        num_res_blocks=given.pop("num_res_blocks"),
        attention_levels=tuple(i for i in range(len(mult)) if 2**i in factors),
        head_dim=given.pop("num_head_channels"),
        context_dim=given.pop("context_dim"),
        transformer_depth=given.pop("transformer_depth", 1),
        in_channels=given.pop("in_channels"),
        out_channels=given.pop("out_channels"),
        use_linear=given.pop("use_linear", False),
        temporal_conv=given.pop("temporal_conv", False),
        init_attention=given.pop("addition_attention", False),
        fps_condition=given.pop("fps_cond", False),
        norm_groups=given.pop("norm_groups", UNetSpec.norm_groups),
    )
    _refuse_rest(given, _UNET_IRRELEVANT)
    return spec


def _vae_spec(given: dict[str, Any]) -> VaeSpec:
    if given.pop("attn_resolutions", []):
        raise ValueError("the autoencoder configuration needs attn_resolutions = []")
    spec = VaeSpec(
        channels=given.pop("ch"),
        channel_mult=tuple(given.pop("ch_mult")),
        num_res_blocks=given.pop("num_res_blocks"),
        z_channels=given["z_channels"],
        embed_dim=given.pop("embed_dim", given["z_channels"]),
        in_channels=given.pop("in_channels", 3),
        out_channels=given.pop("out_ch", 3),
        scale_factor=given.pop("scale_factor", VaeSpec.scale_factor),
        norm_groups=given.pop("norm_groups", VaeSpec.norm_groups),
    )
    _refuse_rest(given, _VAE_IRRELEVANT | {"z_channels"})
    return spec


def _refuse_rest(given: dict[str, Any], irrelevant: set[str]) -> None:
    unknown = sorted(given.keys() - irrelevant)
    if unknown:
        raise ValueError(f"unknown settings in the official configuration: {', '.join(unknown)}")
