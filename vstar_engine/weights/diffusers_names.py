"""Names: diffusers' of a 3-D UNet, an autoencoder and a CLIP text model, and the official ones that hold the same tensors."""

import re
from collections.abc import Iterable, Iterator

from vstar_engine.config.models import UNetSpec, VaeSpec

# diffusers' part of a residual block -> the official part
RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# diffusers' layer outside the blocks -> the official one
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "fps_embedding.linear_1": "fps_embedding.0",
    "fps_embedding.linear_2": "fps_embedding.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# the parts of an official block, in the order of their numbers, and what diffusers calls their list
BLOCK_PARTS = ("resnets", "attentions", "temp_attentions")
TEMPORAL_CONV = "temopral_conv."
ATTENTION_VAE = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# diffusers 0.15 and before: today's name of an autoencoder's attention -> the name then
OLD_ATTENTION_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
TEXT_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TEXT_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
# what stands before the names of a CLIP text model in files of transformers 4
TEXT_PREFIX = "text_model."
# tensors that a CLIP text model's file may hold and text-to-video does not need
TEXT_UNNEEDED = ("embeddings.position_ids", "text_projection.weight")


def _blocks(spec: UNetSpec) -> Iterator[tuple[str, str, str]]:
    """Yields each official block, diffusers' block, and the number of the part in its lists."""
    row = spec.num_res_blocks + 1
    for level in range(spec.levels):
        for i in range(row):
            if i < spec.num_res_blocks:
                yield f"input_blocks.{1 + level * row + i}", f"down_blocks.{level}", str(i)
            yield f"output_blocks.{level * row + i}", f"up_blocks.{level}", str(i)


def unet_modules(spec: UNetSpec) -> dict[str, str]:
    """Returns official module -> diffusers' module, for the parts of blocks and what stands outside them."""
    found = {official: name for name, official in ENDS.items()} | {"init_attn.0": "transformer_in"}
    for official, block, i in _blocks(spec):
        found |= {f"{official}.{number}": f"{block}.{part}.{i}" for number, part in enumerate(BLOCK_PARTS)}
    middle = ("resnets.0", "attentions.0", "temp_attentions.0", "resnets.1")
    found |= {f"middle_block.{number}": f"mid_block.{part}" for number, part in enumerate(middle)}
    row = spec.num_res_blocks + 1
    for level in range(spec.levels - 1):
        found[f"input_blocks.{(level + 1) * row}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        last = f"output_blocks.{level * row + row - 1}"
        # behind the transformers, where the level has them
        number = 3 if spec.levels - 1 - level in spec.attention_levels else 1
        found[f"{last}.{number}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return found


def unet_names(spec: UNetSpec, official: Iterable[str]) -> dict[str, str]:
    """Returns official name -> diffusers' name, of tensors or of layers; names that diffusers' UNet lacks are left out."""
    modules = unet_modules(spec)
    inner = {ours: name for name, ours in RESIDUAL.items()}
    found = {}
    for name in official:
        words = name.split(".")
        depth = next((i for i in range(len(words), 0, -1) if ".".join(words[:i]) in modules), None)
        if depth is None:
            continue
        module, rest = modules[".".join(words[:depth])], ".".join(words[depth:])
        if ".resnets." in module:
            if rest.startswith(TEMPORAL_CONV):
                module, rest = module.replace("resnets", "temp_convs"), rest.removeprefix(TEMPORAL_CONV)
            else:
                part = next((part for part in inner if rest == part or rest.startswith(f"{part}.")), None)
                if part is None:
                    continue
                rest = inner[part] + rest.removeprefix(part)
        found[name] = f"{module}.{rest}" if rest else module
    return found


def vae_name(spec: VaeSpec, official: str) -> str:
    """Returns diffusers' name of an autoencoder's tensor."""
    last = len(spec.channel_mult) - 1
    name = re.sub(r"encoder\.down\.(\d+)", r"encoder.down_blocks.\1", official)
    name = re.sub(r"decoder\.up\.(\d+)", lambda found: f"decoder.up_blocks.{last - int(found[1])}", name)
    name = name.replace(".downsample.", ".downsamplers.0.").replace(".upsample.", ".upsamplers.0.")
    name = name.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out").replace(".block.", ".resnets.")
    name = re.sub(r"mid\.block_(\d)", lambda found: f"mid_block.resnets.{int(found[1]) - 1}", name)
    head, attention, rest = name.partition("mid.attn_1.")
    if attention:
        part, _, leaf = rest.rpartition(".")
        return f"{head}mid_block.attentions.0.{ATTENTION_VAE[part]}.{leaf}"
    return name


def old_vae_name(name: str) -> str:
    """Returns the name that a tensor of diffusers' autoencoder had until diffusers 0.15."""
    head, attention, rest = name.partition("attentions.0.")
    part, _, leaf = rest.rpartition(".")
    return f"{head}{attention}{OLD_ATTENTION_VAE.get(part, part)}.{leaf}" if attention else name


def text_names(official: str) -> tuple[str, ...]:
    """Returns the names, without `text_model.`, whose tensors make up one of the text tower, stacked along the first axis."""
    if official in TEXT_ENDS:
        return (TEXT_ENDS[official],)
    number, _, rest = official.removeprefix("transformer.resblocks.").partition(".")
    layer = f"encoder.layers.{number}"
    if rest.startswith("attn.in_proj_"):
        leaf = rest.removeprefix("attn.in_proj_")
        return tuple(f"{layer}.self_attn.{part}_proj.{leaf}" for part in "qkv")
    part, _, leaf = rest.rpartition(".")
    return (f"{layer}.{TEXT_LAYER[part]}.{leaf}",)
