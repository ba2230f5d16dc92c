"""A model's three networks as a folder that diffusers' TextToVideoSDPipeline loads."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vstar_engine.artifacts.files import check_writable, write_aside
from vstar_engine.config.models import Spec, UNetSpec
from vstar_engine.errors import ExportError, MissingLibrary
from vstar_engine.networks.layers import sinusoid
from vstar_engine.prompting import tokenizer
from vstar_engine.weights import diffusers_names as names
from vstar_engine.weights.key_map import TEXT, UNET, VAE

SCHEDULER = "vstar_engine.integrations.diffusers.rescaled_ddim"
MADE = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae")
# what an open CLIP tower has and the pipeline does not need
TEXT_UNNEEDED = ("text_projection", "logit_scale")


def to_diffusers(
    spec: Spec, weights: Mapping[str, Tensor], folder: str | Path, fps_condition: int = 28, force: bool = False
) -> None:
    """Writes a pipeline's folder in float32 from official names; the frame rate becomes part of the time embedding.

    diffusers has no place for a frame rate: that of `fps_condition` is added to the time embedding's last bias, so a folder is
    for one. The scheduler is this package's, which carries the rescale. transformers' tokenizer reads an exclamation mark as
    padding, which is token 0 here. Raises ExportError for tensors that have no place
    there or are missing, and MissingLibrary without diffusers and transformers.
    """
    try:
        import diffusers
        from transformers import CLIPTextConfig, CLIPTextModel

        from vstar_engine.integrations.diffusers.rescaled_ddim import RescaledDDIMScheduler
    except ImportError as error:
        raise MissingLibrary(
            f"this needs diffusers and transformers ({error}): pip install 'vstar-engine[diffusers]'"
        ) from error
    folder = Path(folder)
    check_writable(folder, force, made=MADE)
    unet = _filled(diffusers.UNet3DConditionModel(**_unet_config(spec.unet)), _unet(spec.unet, weights, fps_condition), "unet")
    vae = _filled(
        diffusers.AutoencoderKL(**_vae_config(spec)), _renamed(weights, VAE, lambda name: names.vae_name(spec.vae, name)), "vae"
    )
    text = spec.text
    config = CLIPTextConfig(
        hidden_size=text.width,
        intermediate_size=4 * text.width,
        num_attention_heads=text.heads,
        # the last layer is not run
        num_hidden_layers=text.layers - 1,
        hidden_act="gelu",
        bos_token_id=tokenizer.START,
        eos_token_id=tokenizer.END,
        pad_token_id=0,
    )
    clip = CLIPTextModel(config)
    prefix = names.TEXT_PREFIX if any(name.startswith(names.TEXT_PREFIX) for name in clip.state_dict()) else ""
    _filled(clip, _text(weights, prefix, f"encoder.layers.{text.layers - 1}."), "text_encoder")
    index = {
        "_class_name": "TextToVideoSDPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": [SCHEDULER, "RescaledDDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet3DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    with write_aside(folder, folder=True) as aside:
        for part, module in (("unet", unet), ("vae", vae), ("text_encoder", clip)):
            module.save_pretrained(aside / part)
        RescaledDDIMScheduler().save_pretrained(aside / "scheduler")
        _write_tokenizer(aside / "tokenizer", text.context_length)
        (aside / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _unet_config(spec: UNetSpec) -> dict[str, Any]:
    if not (spec.temporal_conv and spec.init_attention and spec.use_linear and spec.transformer_depth == 1):
        raise ExportError("diffusers' UNet3DConditionModel has temporal convolutions, a stem's attention, linear projections")
    attends = [level in spec.attention_levels for level in range(spec.levels)]
    return {
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "block_out_channels": tuple(spec.model_channels * mult for mult in spec.channel_mult),
        "down_block_types": tuple("CrossAttnDownBlock3D" if yes else "DownBlock3D" for yes in attends),
        "up_block_types": tuple("CrossAttnUpBlock3D" if yes else "UpBlock3D" for yes in reversed(attends)),
        "layers_per_block": spec.num_res_blocks,
        "norm_num_groups": spec.norm_groups,
        "cross_attention_dim": spec.context_dim,
        "attention_head_dim": spec.head_dim,
    }


def _vae_config(spec: Spec) -> dict[str, Any]:
    vae = spec.vae
    levels = len(vae.channel_mult)
    return {
        "in_channels": vae.in_channels,
        "out_channels": vae.out_channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(vae.channels * mult for mult in vae.channel_mult),
        "layers_per_block": vae.num_res_blocks,
        "latent_channels": vae.z_channels,
        "norm_num_groups": vae.norm_groups,
        "scaling_factor": vae.scale_factor,
    }


def _below(weights: Mapping[str, Tensor], prefix: str) -> Iterable[tuple[str, Tensor]]:
    for name in weights:
        if name.startswith(prefix):
            yield name.removeprefix(prefix), weights[name].float()


def _renamed(weights: Mapping[str, Tensor], prefix: str, rename: Callable[[str], str]) -> dict[str, Tensor]:
    return {rename(name): tensor for name, tensor in _below(weights, prefix)}


def _unet(spec: UNetSpec, weights: Mapping[str, Tensor], fps: int) -> dict[str, Tensor]:
    """Returns the UNet's tensors under diffusers' names, the embedding of the frame rate within the time embedding's bias."""
    held = dict(_below(weights, UNET))
    if spec.fps_condition:
        parts = [held.pop(f"fps_embedding.{layer}.{leaf}") for layer in (0, 2) for leaf in ("weight", "bias")]
        hidden = nn.functional.silu(parts[0] @ sinusoid(torch.tensor(fps), spec.model_channels) + parts[1])
        held["time_embed.2.bias"] = held["time_embed.2.bias"] + parts[2] @ hidden + parts[3]
    found = names.unet_names(spec, held)
    lost = sorted(held.keys() - found.keys())
    if lost:
        raise ExportError(f"diffusers' UNet has no place for {', '.join(lost[:3])}")
    return {name: held[official] for official, name in found.items()}


def _text(weights: Mapping[str, Tensor], prefix: str, last: str) -> dict[str, Tensor]:
    """Returns the text tower's tensors under transformers' names, without its last layer."""
    found = {}
    for official, tensor in _below(weights, TEXT):
        if official.startswith(TEXT_UNNEEDED):
            continue
        theirs = names.text_names(official)
        for name, part in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            if not name.startswith(last):
                found[prefix + name] = part
    return found


def _filled(module: nn.Module, tensors: Mapping[str, Tensor], part: str) -> Any:
    """Fills a module; ExportError unless every parameter has one tensor of its size, and every tensor a parameter."""
    parameters = dict(module.named_parameters())
    wrong = sorted(parameters.keys() ^ tensors.keys())
    wrong += [name for name in parameters if name in tensors and parameters[name].numel() != tensors[name].numel()]
    if wrong:
        raise ExportError(
            f"{part}: {len(wrong)} tensors are missing, unknown or of another size, such as {', '.join(wrong[:3])}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name].reshape(parameter.shape))
    return module.eval()


def _write_tokenizer(folder: Path, length: int) -> None:
    """Writes CLIP's tokenizer, padded with token 0 as the networks were trained."""
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(tokenizer._tokenizer().to_str())["model"]
    begin, end = "<|startoftext|>", "<|endoftext|>"
    named = {{tokenizer.START: begin, tokenizer.END: end}.get(i, word): i for word, i in model["vocab"].items()}
    (folder / "vocab.json").write_text(json.dumps(named, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in model["merges"])]) + "\n")
    special = {"bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": "!"}
    config = {**special, "model_max_length": length, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
