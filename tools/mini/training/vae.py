"""Trains the KL autoencoder on single frames, whitens its latents exactly, and later sharpens the decoder alone.

f8: the UNet then works on 12x16 cells, where two cores can train it in an hour; f4 would cost it four times as much.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vstar_engine.networks.vae import Vae

from .loop import Loop, Run

PULL, JITTER, REFINE_JITTER = 1e-4, 0.15, 0.1
CELLS = (2, 4, 8)
WHITEN_FRAMES = 2048


def to_network(frames: np.ndarray) -> Tensor:
    """uint8 (n, H, W, 3) -> (n, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: Tensor) -> np.ndarray:
    """(n, 3, H, W) in about [-1, 1] -> uint8 (n, H, W, 3)."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def draw(clips: np.ndarray, rng: np.random.Generator, count: int, crop: tuple[int, int]) -> Tensor:
    """Draws `count` frames, each cut to `crop` = (height, width) at a random place."""
    tops, lefts = rng.integers(0, clips.shape[2] - crop[0] + 1, count), rng.integers(0, clips.shape[3] - crop[1] + 1, count)
    which, when = rng.integers(0, len(clips), count), rng.integers(0, clips.shape[1], count)
    cut = [clips[c, t, y : y + crop[0], x : x + crop[1]] for c, t, y, x in zip(which, when, tops, lefts, strict=True)]
    return to_network(np.stack(cut))


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def distance(decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Returns the mean absolute error of pixels, of their differences and of means over larger cells."""
    return {
        "pixel": F.l1_loss(decoded, images),
        "edge": sum((F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(images), strict=True)), torch.zeros(())),
        "cells": sum((F.l1_loss(F.avg_pool2d(decoded, s), F.avg_pool2d(images, s)) for s in CELLS), torch.zeros(())),
    }


def loss(vae: Vae, images: Tensor, jitter: float) -> dict[str, Tensor]:
    """Returns the distance and a small KL term towards N(0, 1); `jitter` is noise on the codes in their deviations."""
    mean, logvar = vae.posterior(images)
    noise = torch.randn_like(mean) * (0.5 * logvar).exp() + torch.randn_like(mean) * jitter * mean.detach().std()
    losses = distance(vae.decoder(vae.post_quant_conv(mean + noise)), images)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return {"loss": sum(losses.values(), PULL * kl), **losses, "kl": kl}


@torch.no_grad()
def whiten(vae: Vae, images: Tensor) -> None:
    """Folds a 4x4 map into the 1x1 convolutions so that scaled latents have mean 0 and covariance 1; pixels stay the same."""
    codes = torch.cat([vae.posterior(part)[0] for part in images.split(32)]).double()
    codes = codes.permute(0, 2, 3, 1).flatten(0, 2)  # (cells, 4)
    values, vectors = torch.linalg.eigh(codes.T.cov())
    gain = 1 / vae.spec.scale_factor
    forward = gain * vectors @ torch.diag(values.rsqrt()) @ vectors.T
    centre = codes.mean(0)
    encode, decode, width = vae.quant_conv, vae.post_quant_conv, len(centre)
    assert encode.bias is not None
    assert decode.bias is not None
    # the variance follows the map's overall scale; nothing but training reads it
    encode.bias[width:] += 2 * forward.diagonal().abs().log().mean()
    encode.bias[:width] = (forward @ (encode.bias[:width].double() - centre)).float()
    encode.weight[:width] = (forward @ encode.weight[:width, :, 0, 0].double()).float()[..., None, None]
    back = decode.weight[:, :, 0, 0].double()
    decode.bias += (back @ centre).float()
    decode.weight[:] = (back @ torch.linalg.inv(forward)).float()[..., None, None]


def train(run: Run, clips: np.ndarray) -> Vae:
    """Trains on crops, then on whole frames; returns the whitened autoencoder."""
    vae = Vae(run.spec.vae)
    loop = Loop(run, "vae", nn.ModuleDict({"vae": vae}), steps=run.steps("vae"), rate=1.5e-3)

    def step(index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        late = index > 0.8 * loop.steps
        # at last the decoder learns to forgive what a UNet gets slightly wrong
        jitter = JITTER if index > 0.85 * loop.steps else 0.0
        return loss(vae, draw(clips, rng, 8 if late else 24, (96, 128) if late else (48, 64)), jitter)

    loop.run(step)
    if not loop.finished:
        vae.eval()
        whiten(vae, draw(clips, np.random.default_rng(1), WHITEN_FRAMES, (96, 128)))
        loop.finish()
    return vae.eval().requires_grad_(False)


def refine(run: Run, clips: np.ndarray, vae: Vae) -> Vae:
    """Trains the decoder on, on whole frames; what the encoder gives, and so the UNet's world, stays as it is."""
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}).requires_grad_(True)
    loop = Loop(run, "decoder", decoder, steps=run.steps("decoder"), rate=8e-4)

    def step(index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        images = draw(clips, rng, 8, (96, 128))
        with torch.no_grad():
            codes = vae.posterior(images)[0]
            codes = codes + torch.randn_like(codes) * REFINE_JITTER * codes.std()
        losses = distance(vae.decoder(vae.post_quant_conv(codes)), images)
        return {"loss": sum(losses.values(), torch.zeros(())), **losses}

    loop.run(step)
    if not loop.finished:
        loop.finish()
    return vae.eval().requires_grad_(False)
