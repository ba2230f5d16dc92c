"""How far a run in some dtype strays from float32's (float32 from float64's) with the same noise, step by step."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from vstar_engine.bench.harness.contest import NotHere, Pace
from vstar_engine.bench.harness.random_networks import lay_out, step_inputs
from vstar_engine.bench.harness.rows import WRONG, ResultFile, ResultRow
from vstar_engine.bench.ops.temporal_transformer import WIDER, without_waste
from vstar_engine.config.sampling import Sampling
from vstar_engine.networks.unet import UNet
from vstar_engine.sampling.ddim import sample
from vstar_engine.sampling.schedule import Schedule
from vstar_engine.sampling.tar import table
from vstar_engine.weights import bundled

from .workload import TAR, Workload, trained_unet

# the cosine that the last latents must keep. Without the regulariser the mini model's end at 0.9
LEAST_COSINE = 0.98


def cosine(got: Tensor, wanted: Tensor) -> float:
    """Returns the cosine of the angle between two tensors."""
    return float(torch.nn.functional.cosine_similarity(got.double().flatten(), wanted.double().flatten(), dim=0))


def psnr(got: Tensor, wanted: Tensor) -> float:
    """Returns the peak signal-to-noise ratio in dB, the peak being the range of `wanted`; 200 where they are equal."""
    wanted = wanted.double()
    error = float((got.double() - wanted).square().mean())
    return 10 * math.log10(float(wanted.max() - wanted.min()) ** 2 / error) if error else 200.0


def walk(workload: Workload, network: Callable[[int], UNet], dtype: torch.dtype, steps: int) -> Iterator[Tensor]:
    """Samples with both branches in one batch, by the network of each step, and yields the latents after it.

    A workload's noise is always the same.
    """
    latents, _, context, fps, _ = step_inputs(workload.spec, workload.size, workload.frames, workload.device, torch.float32)
    generator = torch.Generator().manual_seed(1)
    tape = torch.randn(steps, *latents.shape, generator=generator)

    def denoise(x: Tensor, timestep: Tensor, index: int) -> tuple[Tensor, Tensor]:
        tar = table(TAR, workload.spec.unet.levels, workload.frames, index).to(workload.device)
        noise = network(index)(x.to(dtype), timestep[:, None], context.to(dtype), fps, tar)
        cond, uncond = noise.to(x.dtype).chunk(2)
        return cond, uncond

    kept = torch.promote_types(dtype, torch.float32)
    for *_, after, _ in sample(
        denoise, Schedule.ddim(steps), latents.to(kept), guidance=Sampling.guidance, noise=tape.to(kept)
    ):
        yield after


@torch.no_grad()
def measure(workload: Workload, steps: int, rows: ResultFile, pace: Pace) -> None:
    """Walks both runs side by side and writes cosine and PSNR of every step's latents, of as many as there is time for."""
    wide = WIDER[workload.dtype]
    ours = lay_out(trained_unet(workload.spec, workload.device, workload.dtype), "channels_last")
    exact = trained_unet(workload.spec, workload.device, workload.dtype).to(wide)
    plain = workload.by_passes(exact, lambda level: without_waste(None))
    regularised = workload.by_passes(exact, lambda level: without_waste(workload.bias(level)))
    until = TAR.until_step if TAR else -1
    right = walk(workload, lambda index: regularised if index <= until else plain, wide, steps)
    pairs = zip(walk(workload, lambda index: ours, workload.dtype, steps), right, strict=True)
    found: list[tuple[float, float]] = []
    longest, begun = 0.0, time.monotonic()
    while pace.left > longest and (pair := next(pairs, None)):
        found.append((cosine(*pair), psnr(*pair)))
        longest, begun = max(longest, time.monotonic() - begun), time.monotonic()
    if not found:
        raise NotHere("0 s were left")
    cosines, ratios = ([round(x, 6) for x in column] for column in zip(*found, strict=True))
    numbers = {"cosine": cosines, "psnr": ratios, "last_cosine": cosines[-1], "last_psnr": ratios[-1], "against": str(wide)[6:]}
    # seeded weights may amplify any rounding, so they are held to nothing
    trained = workload.model in bundled.BUNDLED
    case = {"part": "trajectory", **workload.case, "steps": steps, "weights": "trained" if trained else "seeded"}
    row = ResultRow("pipeline", case, "ours", str(workload.dtype)[6:], str(workload.device), numbers=numbers)
    if len(found) < steps:
        row = replace(row, note=f"{len(found)} of {steps} steps, then the time was spent")
    if trained and not cosines[-1] >= LEAST_COSINE:
        words = f"the last latents' cosine is {cosines[-1]:.3f}, wanted at least {LEAST_COSINE}"
        row = replace(row, status=WRONG, note=words, numbers={})
    rows.write(row)
