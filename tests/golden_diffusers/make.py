"""Writes this folder's golden cases: numbers of diffusers 0.42.1 and transformers on small networks with generated weights.

python tests/golden_diffusers/make.py
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, UNet3DConditionModel
from safetensors.numpy import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vstar_engine.artifacts.files import sha256
from vstar_engine.config.models import TextSpec, UNetSpec, VaeSpec
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.networks.unet import UNet
from vstar_engine.networks.vae import Vae
from vstar_engine.prompting.tokenizer import TRANSFORMERS_SPECIAL, merges, vocabulary
from vstar_engine.verification.golden import normalish
from vstar_engine.weights import diffusers_names as names
from vstar_engine.weights.key_map import module_shapes

HERE, SEED = Path(__file__).parent, 20260
UNET = UNetSpec(16, (1, 2, 2), 1, (0, 1), 8, 12, fps_condition=False, norm_groups=8)
VAE = VaeSpec(16, (1, 2), 1, norm_groups=8)
TEXT = TextSpec(12, 2, 3, tokenizer="transformers", pad=0)
PROMPTS = ["", "A harbour from low tide to high tide", "hi! there  &amp; <|endoftext|> É café x!!", "a " * 100]


def table(module: nn.Module) -> list[list[Any]]:
    """Returns name, shape, mean and deviation of each tensor of a network of ours, under its official name."""
    rows = []
    for name, shape in module_shapes(module).items():
        scale = float(np.prod(shape[1:])) ** -0.5 if len(shape) > 1 else 0.1
        rows.append([name, list(shape), 1.0 if len(shape) == 1 and _is_norm(name) else 0.0, scale])
    return rows


def _is_norm(name: str) -> bool:
    words = name.split(".")
    return words[-1] == "weight"


def generated(prefix: str, rows: list[list[Any]]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns weights, and the entry of the manifest that generates them again."""
    made = {name: normalish(SEED, prefix + name, shape, std, mean) for name, shape, mean, std in rows}
    hashed = hashlib.sha256(b"".join(value.tobytes() for value in made.values())).hexdigest()
    told = {"table": rows, "name_prefix": prefix, "seed": SEED, "sha256_of_concatenated_fp32": hashed}
    return made, told


def fill(theirs: nn.Module, values: dict[str, np.ndarray], parts: dict[str, tuple[str, ...]], before: str = "") -> None:
    """Fills a network of diffusers or transformers with weights under their official names."""
    state, found = theirs.state_dict(), {}
    for official, made in parts.items():
        pieces = torch.from_numpy(values[official]).chunk(len(made)) if len(made) > 1 else [torch.from_numpy(values[official])]
        for name, piece in zip(made, pieces, strict=True):
            found[before + name] = piece.reshape(state[before + name].shape)
    assert not {name for name in state if name not in found and "position_ids" not in name}
    theirs.load_state_dict(found, strict=False)
    theirs.eval().requires_grad_(False)


def half(*shape: int, seed: int) -> Tensor:
    """Returns values that float16 holds exactly."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half().float()


def unet_case() -> tuple[dict[str, Any], dict[str, Tensor]]:
    with torch.device("meta"):
        rows = table(UNet(UNET))
    values, told = generated("unet.", rows)
    channels = [UNET.model_channels * mult for mult in UNET.channel_mult]
    theirs = UNet3DConditionModel(
        down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=channels,
        layers_per_block=UNET.num_res_blocks,
        cross_attention_dim=UNET.context_dim,
        attention_head_dim=UNET.head_dim,
        norm_num_groups=UNET.norm_groups,
    )
    fill(theirs, values, {official: (name,) for official, name in names.unet_names(UNET, values).items()})
    x, context = half(2, 4, 5, 8, 12, seed=1), half(2, 77, UNET.context_dim, seed=2)
    timesteps = torch.tensor([481, 41])
    out = theirs(x, timesteps, context).sample
    params = {
        "model_channels": UNET.model_channels,
        "channel_mult": UNET.channel_mult,
        "num_res_blocks": UNET.num_res_blocks,
        "attention_resolutions": [2**level for level in UNET.attention_levels],
        "num_head_channels": UNET.head_dim,
        "context_dim": UNET.context_dim,
        "in_channels": 4,
        "out_channels": 4,
        "use_linear": True,
        "temporal_conv": True,
        "addition_attention": True,
        "fps_cond": False,
        "norm_groups": UNET.norm_groups,
    }
    case = {"unet_params": params, "generated_weights": told, "config": {"per_frame": False, "regularised_layers": []}}
    fps = torch.tensor([8, 8])
    return case, {"x": x, "timesteps": timesteps, "context": context, "fps": fps, "out": out}


def vae_case() -> tuple[dict[str, Any], dict[str, Tensor]]:
    with torch.device("meta"):
        rows = table(Vae(VAE))
    values, told = generated("vae.", rows)
    theirs = AutoencoderKL(
        block_out_channels=[VAE.channels * mult for mult in VAE.channel_mult],
        layers_per_block=VAE.num_res_blocks,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=VAE.norm_groups,
    )
    fill(theirs, values, {official: (names.vae_name(VAE, official),) for official in values})
    z, px = half(1, 4, 3, 4, 6, seed=3), half(2, 3, 8, 12, seed=4).clamp(-1, 1)
    frames = theirs.decode(z[0].transpose(0, 1) / VAE.scale_factor).sample.transpose(0, 1)[None]
    posterior = theirs.encode(px).latent_dist
    dd = {"ch": VAE.channels, "ch_mult": VAE.channel_mult, "num_res_blocks": 1, "z_channels": 4, "attn_resolutions": []}
    case = {"ddconfig": {**dd, "norm_groups": VAE.norm_groups}, "embed_dim": 4, "scale_factor": VAE.scale_factor}
    noise = half(2, 4, 4, 6, seed=5)
    drawn = VAE.scale_factor * (posterior.mean + posterior.std * noise)
    arrays = {"z": z, "px": px, "frames": frames, "post_mean": posterior.mean, "post_logvar": posterior.logvar}
    return {**case, "generated_weights": told}, {**arrays, "post_noise": noise, "z_encoded": drawn}


def text_case() -> tuple[dict[str, Any], dict[str, Tensor]]:
    with torch.device("meta"):
        rows = table(TextTower(TEXT))
    values, told = generated("text.", rows)
    config = CLIPTextConfig(
        hidden_size=TEXT.width,
        num_hidden_layers=TEXT.layers - 1,
        num_attention_heads=TEXT.heads,
        intermediate_size=4 * TEXT.width,
        hidden_act="gelu",
    )
    theirs = CLIPTextModel(config)
    before = names.TEXT_PREFIX if any(name.startswith(names.TEXT_PREFIX) for name in theirs.state_dict()) else ""
    fill(theirs, values, {official: names.text_names(official) for official in values}, before)
    tokenizer = CLIPTokenizer(vocab=vocabulary(TRANSFORMERS_SPECIAL), merges=merges(), pad_token="!", model_max_length=77)
    tokens = torch.tensor(tokenizer(PROMPTS, padding="max_length", truncation=True)["input_ids"])
    about = {
        "context_length": 77,
        "vocab_size": TEXT.vocab_size,
        "width": TEXT.width,
        "heads": TEXT.heads,
        "layers": TEXT.layers,
    }
    case = {"prompts": PROMPTS, "config": {**about, "tokenizer": TEXT.tokenizer, "pad": TEXT.pad}, "generated_weights": told}
    return case, {"tokens": tokens.int(), "embeddings": theirs(tokens)[0]}


def main() -> None:
    cases = []
    for kind, made in (("unet", unet_case), ("vae", vae_case), ("text_encoder", text_case)):
        case, arrays = made()
        path = HERE / f"{kind}.safetensors"
        save_file({name: np.ascontiguousarray(tensor.numpy()) for name, tensor in arrays.items()}, path)
        cases.append({"name": f"diffusers_{kind}", "kind": kind, "file": path.name, "sha256": sha256(path), **case})
    source = {"diffusers": diffusers.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    manifest = {"format": 1, "set": "diffusers", "source": source, "cases": cases}
    (HERE / "manifest.json").write_text(json.dumps(manifest) + "\n")


if __name__ == "__main__":
    main()
