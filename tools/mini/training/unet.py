"""Trains the UNet to predict noise in latents: single frames first, then short windows, then whole clips.

Every frame has its own noise, as in sampling. Low-noise steps count less (min-SNR weights, arXiv 2303.09556): what a scene
is gets decided in the noisy ones. There a wrong scene is a small error of the noise, so the noisiest count more.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vstar_engine.artifacts.files import write_aside
from vstar_engine.config.sampling import TRAINING_STEPS
from vstar_engine.networks.blocks import SpatialBlock, TemporalConvBlock, TemporalTransformer
from vstar_engine.networks.spatial_attention import sdpa
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.networks.unet import UNet
from vstar_engine.networks.vae import Vae
from vstar_engine.prompting.tokenizer import tokenize
from vstar_engine.sampling import schedule

from .loop import Loop, Run
from .vae import to_network

# (up to this share of the steps, frames, clips)
PHASES = ((0.22, 1, 64), (0.5, 8, 8), (1.0, 16, 4))
FPS = 28
UNSAID = 0.1  # share of clips trained with the empty caption, for guidance
MOST_SNR, LEAST_SNR = 5.0, 0.5
TEMPORAL_RATE = 2.0


@torch.autocast("cpu", enabled=False)
def wide_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Spatial attention in float32: its backward is three times as fast there as in bfloat16 (AMD EPYC, torch 2.13)."""
    return sdpa(q.float(), k.float(), v.float()).to(q.dtype)


class UNetLoop(Loop):
    """Temporal layers learn faster: they start with the least to go by."""

    def groups(self) -> list[dict]:
        temporal = {
            id(parameter)
            for module in self.module.modules()
            if isinstance(module, TemporalTransformer | TemporalConvBlock)
            for parameter in module.parameters()
        }
        fast = [parameter for parameter in self.module.parameters() if id(parameter) in temporal]
        rest = [parameter for parameter in self.module.parameters() if id(parameter) not in temporal]
        return [{"params": rest}, {"params": fast, "scale": TEMPORAL_RATE}]


def encoded(folder: Path, vae: Vae, clips: np.ndarray) -> Tensor:
    """Returns every frame's latents, (clips, 16, 4, 12, 16) float16, kept in `folder`."""
    path = folder / f"latents-{len(clips)}.pt"
    if not path.is_file():
        with torch.inference_mode():
            latents = torch.stack([vae.encode(to_network(clip)).half() for clip in tqdm(clips, "encode", mininterval=10)])
        with write_aside(path) as aside:
            torch.save(latents, aside)
    return torch.load(path, weights_only=True)


def train(run: Run, latents: Tensor, tokens: Tensor, tower: TextTower) -> UNet:
    """Trains on latents (clips, 16, 4, 12, 16) and captions' tokens (clips, wordings, 77); returns the averaged weights."""
    unet = UNet(run.spec.unet)
    nn.init.zeros_(unet.get_parameter("out.2.weight"))
    for module in unet.modules():
        if isinstance(module, SpatialBlock):
            module.attend = wide_attention
    loop = UNetLoop(run, "unet", unet, steps=run.steps("unet"), rate=8e-4, average=0.999)
    alpha, scale = (
        torch.from_numpy(schedule.alpha_bar()).float(),
        torch.from_numpy(schedule.scale_arr()[:TRAINING_STEPS]).float(),
    )
    snr = alpha * scale**2 / (1 - alpha)
    weight = (MOST_SNR / snr).clamp(max=1.0) * (LEAST_SNR / snr).clamp(min=1.0).sqrt()
    empty = tokenize([""])[0]

    def step(index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        _, frames, count = next(phase for phase in PHASES if index < phase[0] * loop.steps or phase is PHASES[-1])
        which = rng.integers(0, len(latents), count)
        stride = int(rng.integers(1, 3)) if frames == 8 else 1
        starts = rng.integers(0, latents.shape[1] - stride * (frames - 1), count)
        cut = [latents[c, s : s + stride * frames : stride].float() for c, s in zip(which, starts, strict=True)]
        clean = torch.stack(cut).transpose(1, 2)  # (B, 4, T, 12, 16)
        read = tokens[which, rng.integers(0, tokens.shape[1], count)]
        read[torch.from_numpy(rng.random(count) < UNSAID)] = empty
        # one timestep from each of `count` equal parts of the schedule
        time = torch.from_numpy((rng.permutation(count) + rng.random(count)) / count * TRAINING_STEPS).long()
        noise = torch.randn_like(clean)
        a, s = alpha[time].view(-1, 1, 1, 1, 1), scale[time].view(-1, 1, 1, 1, 1)
        noisy = a.sqrt() * s * clean + (1 - a).sqrt() * noise
        fps = torch.full((count,), FPS // stride)
        plain = torch.zeros(1, run.spec.unet.levels, frames)
        error = (unet(noisy, time[:, None], tower(read)[:, None], fps, plain) - noise).square().mean((1, 2, 3, 4))
        return {"loss": (weight[time] * error).mean(), "error": error.mean()}

    loop.run(step)
    if not loop.finished:
        loop.finish()
    return unet.eval().requires_grad_(False)
