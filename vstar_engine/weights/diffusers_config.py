"""diffusers' and transformers' configurations read as our specifications.

Each table says which settings a network of ours follows, which it has fixed, and which change nothing; any other is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vstar_engine.artifacts.text_file import read_text
from vstar_engine.config.models import EPS, TRANSFORMERS, NoiseSpec, TextSpec, UNetSpec, V, VaeSpec
from vstar_engine.config.sampling import TRAINING_STEPS
from vstar_engine.errors import CheckpointError

UNET_CLASSES = UNET_3D, UNET_VIDEOCRAFTER = ("UNet3DConditionModel", "UNet3DVideoCrafterConditionModel")
DOWN, UP = ("DownBlock3D", "CrossAttnDownBlock3D"), ("UpBlock3D", "CrossAttnUpBlock3D")
PREDICTIONS = {"epsilon": EPS, "v_prediction": V}
# settings a network of ours has fixed, each with the value that diffusers takes where a configuration leaves it out
_UNET_FIXED = {
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "num_attention_heads": None,
    "time_cond_proj_dim": None,
}
_VAE_FIXED = {
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_TEXT_FIXED = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "use_attention_mask": False, "quantization_config": None}
_SCHEDULER_FIXED = {
    "num_train_timesteps": TRAINING_STEPS,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "thresholding": False,
}
_DDIM_FIXED = {"clip_sample": True, "timestep_spacing": "leading"}
_UNET_IRRELEVANT = {"sample_size"}
_VAE_IRRELEVANT = {"sample_size", "force_upcast"}
_TEXT_IRRELEVANT = {
    *("architectures", "attention_dropout", "dropout", "initializer_factor", "initializer_range", "model_type"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "projection_dim", "torch_dtype", "dtype", "transformers_version"),
}


class Settings:
    """The settings of one configuration file, each taken once."""

    def __init__(self, path: Path):
        self.path = path
        try:
            content = json.loads(read_text(path))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON ({error})") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
        self.class_name = content.get("_class_name")
        self._every = content
        self._left = {name: value for name, value in content.items() if not name.startswith("_")}

    def every(self) -> dict[str, Any]:
        """Returns the whole content."""
        return self._every

    def left(self) -> dict[str, Any]:
        """Returns the settings that nobody took."""
        return self._left

    def pop(self, name: str, default: Any) -> Any:
        """Returns a setting of any type."""
        return self._left.pop(name, default)

    def take(self, name: str, default: Any) -> Any:
        """Returns a setting of the type of its default; CheckpointError for another type."""
        value = self._left.pop(name, default)
        wanted = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
            raise CheckpointError(f"{self.path}: {name} must be of the kind of {default!r}, got {value!r}")
        return value

    def hold(self, fixed: Mapping[str, Any], wanted: Mapping[str, Any] | None = None) -> None:
        """Raises CheckpointError unless settings have their fixed values, or those `wanted` in their place."""
        for name, default in fixed.items():
            value, right = self._left.pop(name, default), {**fixed, **(wanted or {})}[name]
            if value != right:
                raise CheckpointError(f"{self.path} asks for {name} = {value!r}, which is not computed here; {right!r} is")

    def close(self, irrelevant: set[str]) -> None:
        """Raises CheckpointError for settings that nobody took."""
        if unknown := sorted(self._left.keys() - irrelevant):
            raise CheckpointError(f"{self.path} asks for {', '.join(unknown)}, which is not known here, so it is not ignored")


def unet_spec(path: Path) -> UNetSpec:
    """Reads a UNet3DConditionModel's configuration, or one of UNet3DVideoCrafterConditionModel."""
    given = Settings(path)
    if given.class_name not in UNET_CLASSES:
        raise CheckpointError(f"{path} describes {given.class_name}; {' and '.join(UNET_CLASSES)} are read")
    given.hold(_UNET_FIXED)
    down = given.take("down_block_types", [DOWN[1]] * 3 + [DOWN[0]])
    up = given.take("up_block_types", [UP[0]] + [UP[1]] * 3)
    channels = given.take("block_out_channels", [320, 640, 1280, 1280])
    width = channels[0] if channels else 0
    if not width or any(not isinstance(one, int) or one % width for one in channels):
        raise CheckpointError(f"{path}: block_out_channels must be multiples of the first, got {channels}")
    if set(down) - {*DOWN} or up != [UP[DOWN.index(one)] for one in reversed(down)] or len(down) != len(channels):
        raise CheckpointError(
            f"{path}: each of the {len(channels)} levels is {' or '.join(DOWN)} on the way down and the same kind, "
            f"{' or '.join(UP)}, on the way up; got {', '.join(map(str, down))} and {', '.join(map(str, up))}"
        )
    spec = UNetSpec(
        model_channels=width,
        channel_mult=tuple(one // width for one in channels),
        num_res_blocks=given.take("layers_per_block", 2),
        attention_levels=tuple(level for level, kind in enumerate(down) if kind == DOWN[1]),
        head_dim=given.take("attention_head_dim", 64),
        context_dim=given.take("cross_attention_dim", 1024),
        in_channels=given.take("in_channels", 4),
        out_channels=given.take("out_channels", 4),
        norm_groups=given.take("norm_num_groups", 32),
        fps_condition=given.class_name == UNET_VIDEOCRAFTER and given.take("fps_cond", False),
    )
    given.close(_UNET_IRRELEVANT)
    return spec


def vae_spec(path: Path) -> VaeSpec:
    """Reads an AutoencoderKL's configuration."""
    given = Settings(path)
    if given.class_name != "AutoencoderKL":
        raise CheckpointError(f"{path} describes {given.class_name}; AutoencoderKL is read")
    given.hold(_VAE_FIXED)
    channels = given.take("block_out_channels", [64])
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if (got := given.take(name, [kind])) != [kind] * len(channels):
            raise CheckpointError(f"{path}: {name} must be {kind} for each of the {len(channels)} levels, got {got}")
    width = channels[0] if channels else 0
    if not width or any(not isinstance(one, int) or one % width for one in channels):
        raise CheckpointError(f"{path}: block_out_channels must be multiples of the first, got {channels}")
    latent = given.take("latent_channels", 4)
    spec = VaeSpec(
        channels=width,
        channel_mult=tuple(one // width for one in channels),
        num_res_blocks=given.take("layers_per_block", 1),
        z_channels=latent,
        embed_dim=latent,
        in_channels=given.take("in_channels", 3),
        out_channels=given.take("out_channels", 3),
        scale_factor=float(given.take("scaling_factor", 0.18215)),
        norm_groups=given.take("norm_num_groups", 32),
    )
    given.close(_VAE_IRRELEVANT)
    return spec


def text_spec(path: Path, pad: int) -> TextSpec:
    """Reads a CLIPTextModel's configuration; `pad` is the tokenizer's padding token."""
    given = Settings(path)
    given.hold(_TEXT_FIXED, {"hidden_act": "gelu"})
    width, fixed = given.take("hidden_size", 512), TextSpec(tokenizer=TRANSFORMERS)
    given.hold({"intermediate_size": 2048}, {"intermediate_size": 4 * width})
    given.hold({"vocab_size": fixed.vocab_size, "max_position_embeddings": fixed.context_length})
    # all layers run there; here the last of `layers` does not
    layers, heads = given.take("num_hidden_layers", 12) + 1, given.take("num_attention_heads", 8)
    given.close(_TEXT_IRRELEVANT)
    return TextSpec(width, heads, layers, tokenizer=TRANSFORMERS, pad=pad)


def noise_spec(path: Path) -> NoiseSpec:
    """Reads a scheduler's configuration: the noise of training and, of a DDIMScheduler, where its steps start and end.

    How another scheduler steps is not read, since the sampler is chosen with the video.
    """
    given = Settings(path)
    given.hold(_SCHEDULER_FIXED)
    given.hold({"beta_schedule": "linear"}, {"beta_schedule": "scaled_linear"})
    said = given.take("prediction_type", "epsilon")
    if said not in PREDICTIONS:
        raise CheckpointError(f"{path}: prediction_type must be {' or '.join(PREDICTIONS)}, got {said!r}")
    prediction = PREDICTIONS[said]
    betas = float(given.take("beta_start", 0.0001)), float(given.take("beta_end", 0.02))
    if not 0 < betas[0] < betas[1] < 1:
        raise CheckpointError(f"{path}: betas must ascend between 0 and 1, got {betas[0]} to {betas[1]}")
    spec = NoiseSpec(*betas, prediction, rescale=False)
    if given.class_name != "DDIMScheduler":
        return spec
    given.hold(_DDIM_FIXED, {"clip_sample": False})
    offset = given.take("steps_offset", 0)
    if offset not in (0, 1):
        raise CheckpointError(f"{path}: steps_offset must be 0 or 1, got {offset}")
    return NoiseSpec(*betas, prediction, offset, given.take("set_alpha_to_one", True), rescale=False)
