"""LoRA factors for the mini model, in every layout that files come in."""

import torch

from vstar_engine.config.models import model_named
from vstar_engine.weights.lora import layer_shapes, names

MINI = model_named("mini").unet


TO_Q = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"


CONV, PROJ = "input_blocks.1.0.in_layers.2", "input_blocks.1.1.proj_in"


RANK, ALPHA = 3, 6.0


SHAPES = layer_shapes(MINI)


SMALL = names(MINI, SHAPES)


def factors(layers):
    """Random down and up for some layers, convolutions as (rank, in, 3, 3) and (out, rank, 1, 1)."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for layer in layers:
        out, *rest = SHAPES[layer]
        ones = [1] * (len(rest) - 1)
        made[layer] = torch.randn(RANK, *rest, generator=generator), torch.randn(out, RANK, *ones, generator=generator)
    return made


def kohya(made):
    parts = {}
    for layer, (down, up) in made.items():
        name = "lora_unet_" + layer.replace(".", "_")
        parts |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    return parts


def peft(made, prefix="unet.", scale=ALPHA / RANK):
    """PEFT writes no alpha: here it is in the up matrix."""
    named = {f"{prefix}{layer}.lora_A.weight": down for layer, (down, _) in made.items()}
    return named | {f"{prefix}{layer}.lora_B.weight": scale * up for layer, (_, up) in made.items()}


def diffusers_names(made):
    here = {official: name for name, official in SMALL.items() if name != official}
    return {here[layer]: factors for layer, factors in made.items()}


def processors(made):
    """diffusers' older attention processors."""
    named = {}
    for layer, (down, up) in made.items():
        owner, _, last = layer.removesuffix(".0").rpartition(".")
        named |= {
            f"unet.{owner}.processor.{last}_lora.down.weight": down,
            f"unet.{owner}.processor.{last}_lora.up.weight": 2 * up,
        }
    return named


LAYERS = (TO_Q, CONV, PROJ)


ATTENTION = (TO_Q, TO_Q.replace("to_q", "to_out.0"))


LAYOUTS = {
    "kohya": (kohya, LAYERS),
    "kohya, diffusers names": (lambda made: kohya(diffusers_names(made)), LAYERS),
    "peft": (peft, LAYERS),
    "peft, diffusers names": (lambda made: peft(diffusers_names(made)), LAYERS),
    "peft, saved from a wrapped model": (lambda made: peft(made, "base_model.model."), LAYERS),
    "attention processors": (lambda made: processors(diffusers_names(made)), ATTENTION),
}
