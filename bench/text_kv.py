"""What projecting the text to keys and values once per video, instead of at every step, would gain at best.

Every cross-attention's projection is replaced by its stored result, already one row a frame: nothing is left to interpolate,
so the real gain is smaller. On the mini model at 64 frames, 3.2 % of the FLOPs (0.5 % of the full model's), it was 1.4 and
-2.4 % in two runs of 21 rounds, one thread of a busy AMD EPYC: too little to keep.

`python -m vstar_engine.bench.text_kv --model mini --frames 64`
"""

import argparse

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vstar_engine.config import MODELS
from vstar_engine.unet import CrossAttention, UNet

from .seeded import lay_out, relative_error, seeded_unet, step_inputs
from .timing import interleave

# one linear layer's result, computed once or again
ERROR_BUDGET = 1e-5


class Kept(nn.Module):
    """Stands for a projection and gives the result it had."""

    def __init__(self, result: Tensor):
        super().__init__()
        self.result = result

    def forward(self, context: Tensor) -> Tensor:
        return self.result


def projections(unet: UNet) -> list[CrossAttention]:
    return [module for module in unet.modules() if isinstance(module, CrossAttention)]


@torch.inference_mode()
def main() -> None:
    """Prints the share of a forward's FLOPs, the memory, and the time of the variants in turn."""
    parser = argparse.ArgumentParser(prog="python -m vstar_engine.bench.text_kv", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="mini")
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    spec, device = MODELS[args.model], "cuda" if torch.cuda.is_available() else "cpu"
    unet = lay_out(seeded_unet(spec.unet, device, torch.float32), "channels_last")
    inputs = step_inputs(spec, spec.size, args.frames, device, torch.float32)
    layers = projections(unet)
    text = inputs[2].flatten(0, 1)
    with FlopCounterMode(display=False) as whole:
        wanted = unet(*inputs)
    with FlopCounterMode(display=False) as part:
        kept = [Kept(layer.to_kv(text)) for layer in layers]
    computed = [layer.to_kv for layer in layers]

    def forward(chosen: list[nn.Module]) -> Tensor:
        for layer, projection in zip(layers, chosen, strict=True):
            layer.to_kv = projection  # type: ignore[assignment]
        return unet(*inputs)

    error = relative_error(forward(list(kept)), wanted)
    if error > ERROR_BUDGET:
        raise SystemExit(f"the stored projections give another result: relative error {error:.1e}")
    variants = {"every step": lambda: forward(list(computed)), "once per video": lambda: forward(list(kept))}
    timings = interleave(variants, args.rounds, warmup=1)
    stored = sum(layer.result.nbytes for layer in kept) / 2**20
    share = part.get_total_flops() / whole.get_total_flops()
    print(f"{args.model}, {args.frames} frames: {share:.2%} of a forward's FLOPs, {stored:.0f} MiB stored, error {error:.1e}")
    for name, timing in timings.items():
        print(f"{name:15} {timing.median:.3f} s [{timing.p20:.3f}, {timing.p80:.3f}]")
    print(f"gain {1 - timings['once per video'].median / timings['every step'].median:.1%}")


if __name__ == "__main__":
    main()
