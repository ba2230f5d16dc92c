"""LoRAs saved as a bare list, cloneofsimo's layout, such as T2V-Turbo's `unet_lora.pt` (arXiv 2405.18750).

    [up, down, up, down, ...]

A pair for each linear layer, 2-D and 3-D convolution, in the order in which the UNet that it was trained on registered them; no
names, and no alpha, so that the change is up @ down. Where a pair belongs follows from that order and is held to its shape.
T2V-Turbo's UNet also takes the guidance scale as an input: as latent consistency models do (arXiv 2310.04378) it embeds it in
sines and cosines, projects them without a bias, and adds that to the embedded timestep. Of the projection the file holds the
change alone, so it started at zero. At one scale all of it is a constant vector, which goes into the bias behind it as the LoRA
is merged.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vstar_engine.config import models
from vstar_engine.errors import CheckpointError

from .lora import GUIDED, check_values, layer_shapes

SCALES = 256  # sines and cosines that a guidance scale is embedded in
PROJECTION = "time_cond_proj"
# the parts of the UNet, and of each block, as they were registered; blocks of one kind are counted
PARTS = ("time_embed", "fps_embedding", PROJECTION, "input_blocks", "init_attn", "middle_block", "output_blocks", "out")
INNER = (
    *("in_layers", "emb_layers", "out_layers", "skip_connection", "temopral_conv"),
    *("proj_in", "transformer_blocks", "proj_out"),
    *("attn1", "ff", "attn2", "to_q", "to_k", "to_v", "to_out"),
)
Pair = tuple[Tensor, Tensor]


def embedded(guidance: float) -> Tensor:
    """Returns (SCALES,) sines, then cosines, of a guidance scale."""
    half = SCALES // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float64) / (half - 1))
    angles = 1000.0 * guidance * frequencies
    return torch.cat([angles.sin(), angles.cos()])


def registered(layers: Iterable[str]) -> list[str]:
    """Sorts names of one part's layers as they were registered."""

    def place(word: str) -> tuple[int, str]:
        if word.isdecimal():
            return int(word), ""
        return (INNER.index(word), "") if word in INNER else (0, word)

    return sorted(layers, key=lambda name: [place(word) for word in name.split(".")])


def parts_of(spec: models.UNetSpec) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Lists the layers of each part that such a file has pairs for, with their weights' shapes."""
    # a 1-D convolution gets no pair
    shapes = {name: shape for name, shape in layer_shapes(spec).items() if len(shape) != 3}
    shapes[PROJECTION] = (spec.model_channels, SCALES)
    named = {part: [layer for layer in shapes if layer.split(".")[0] == part] for part in PARTS}
    return {part: [(layer, shapes[layer]) for layer in registered(layers)] for part, layers in named.items() if layers}


def fits(pair: Pair, shape: Sequence[int]) -> bool:
    """Returns whether a pair changes a weight of this shape."""
    up, down = pair
    ones = [1] * (len(shape) - 2)
    return [*up.shape] == [shape[0], len(down), *ones] and [*down.shape[1:]] == [*shape[1:]]


def _begin_with(pairs: Sequence[Pair], layers: Sequence[tuple[str, Sequence[int]]]) -> bool:
    return len(layers) <= len(pairs) and all(fits(pair, shape) for pair, (_, shape) in zip(pairs, layers, strict=False))


def placed(pairs: Sequence[Pair], spec: models.UNetSpec, source: str) -> dict[str, Pair]:
    """Returns each pair the name of its layer. CheckpointError where they are not those of this UNet.

    Which part comes when is read off the shapes: of those that would fit, the first in the order of PARTS.
    """
    left = parts_of(spec)
    found: dict[str, Pair] = {}
    while len(found) < len(pairs):
        rest = pairs[len(found) :]
        part = next((part for part, layers in left.items() if _begin_with(rest, layers)), None)
        if part is None:
            up, down = (tuple(tensor.shape) for tensor in rest[0])
            raise CheckpointError(
                f"{source} does not fit this UNet: from pair {len(found) + 1} of {len(pairs)}, up {up} and down {down}, no "
                f"part that is left ({', '.join(left) or 'none'}) has layers of those shapes"
            )
        found |= {layer: pair for (layer, _), pair in zip(left.pop(part), rest, strict=False)}
    if left.keys() - {PROJECTION}:
        raise CheckpointError(f"{source} ends after {len(pairs)} pairs, before {', '.join(left.keys() - {PROJECTION})}")
    return found


def pairs_in(content: object, source: str) -> list[Pair]:
    """Takes a list of tensors as pairs; CheckpointError for anything else."""
    if not isinstance(content, list) or not content or not all(isinstance(one, Tensor) and one.dim() > 1 for one in content):
        kind = f"a list of {len(content)}" if isinstance(content, list) else f"a {type(content).__name__}"
        raise CheckpointError(f"{source} holds {kind} where a LoRA's list of matrices [up, down, up, down, ...] was expected")
    if len(content) % 2:
        raise CheckpointError(f"{source} holds {len(content)} tensors, which are no pairs of up and down")
    return list(zip(content[::2], content[1::2], strict=True))


def named(content: object, spec: models.UNetSpec, guidance: float, source: str) -> dict[str, Tensor]:
    """Returns the tensors of such a file names that `Lora.read` knows; what the guidance scale adds is one of them."""
    tensors: dict[str, Tensor] = {}
    for layer, (up, down) in placed(pairs_in(content, source), spec, source).items():
        for part in (up, down):
            check_values(f"{source}: layer {layer}", part)
        if layer == PROJECTION:
            tensors[GUIDED] = (up.double() @ (down.double() @ embedded(guidance))).float()
        else:
            tensors |= {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
