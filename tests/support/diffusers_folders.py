"""Small text-to-video pipelines of diffusers with random weights, and the folders that they save."""

from pathlib import Path
from typing import Any

import support.diffusers_packages  # noqa: F401 - skips where they are missing

# isort: split
import torch
from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vstar_engine.prompting.tokenizer import TRANSFORMERS_SPECIAL, merges, vocabulary

UNET: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
VAE: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "hidden_act": "gelu",
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def filled(module: nn.Module, seed: int) -> nn.Module:
    """Draws weights that are zero nowhere, as those of trained networks: diffusers sets some to zero."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0.0, parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return module.eval().requires_grad_(False)


def tokenizer(pad: str = "!") -> CLIPTokenizer:
    """Returns the tokenizer that transformers makes of CLIP's tables."""
    return CLIPTokenizer(vocab=vocabulary(TRANSFORMERS_SPECIAL), merges=merges(), pad_token=pad, model_max_length=77)


def pipeline(unet: dict[str, Any] | None = None, scheduler: dict[str, Any] | None = None) -> TextToVideoSDPipeline:
    """Returns a pipeline with random weights; settings change those of its UNet and scheduler."""
    made = TextToVideoSDPipeline(
        vae=filled(AutoencoderKL(**VAE), 1),
        text_encoder=filled(CLIPTextModel(CLIPTextConfig(**TEXT)), 2),
        tokenizer=tokenizer(),
        unet=filled(UNet3DConditionModel(**{**UNET, **(unet or {})}), 3),
        scheduler=DDIMScheduler(**{**SCHEDULER, **(scheduler or {})}),
    )
    made.set_progress_bar_config(disable=True)
    return made


def saved(made: TextToVideoSDPipeline, folder: Path) -> Path:
    """Saves a pipeline as diffusers does, in safetensors of float32."""
    made.save_pretrained(folder)
    return folder
