"""A small classifier that reads a scene's factors off a single frame, in shares as `captions` says them."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tools.mini.data.captions import hats, one
from tools.mini.data.scenes import COLOURS, DAYS, OBJECTS, SEASONS, WEATHERS, Clip, sample
from vstar_engine.networks.vae import Vae

from .loop import Loop, Run
from .vae import to_network

BATCH = 64
SEEN = {"season": len(SEASONS), "day": len(DAYS), "weather": len(WEATHERS), "object": len(OBJECTS), "colour": len(COLOURS)}
FEATURES = 96
HELD_OUT = range(10_000_000, 10_000_256)  # clips that no training saw


class Probe(nn.Module):
    """(n, 3, 96, 128) in [-1, 1] -> features (n, 96) and log-shares of every factor."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, FEATURES)
        self.body = nn.Sequential()
        for a, b in pairwise(widths):
            self.body.extend([nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU()])
        self.heads = nn.ModuleDict({name: nn.Linear(2 * FEATURES, size) for name, size in SEEN.items()})
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(2 * FEATURES))

    def features(self, images: Tensor) -> Tensor:
        """Returns the mean over the frame and the largest value: (n, 192)."""
        cells = self.body(F.avg_pool2d(images, 2)).flatten(2)
        return torch.cat([cells.mean(2), cells.amax(2)], 1)

    def centred(self, images: Tensor) -> Tensor:
        """Features less their mean over the training set, so that a cosine tells scenes apart."""
        return self.features(images) - self.centre

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.features(images)
        return {name: head(features).log_softmax(1) for name, head in self.heads.items()}


def truth(clip: Clip, frame: int) -> dict[str, np.ndarray]:
    """Returns the true shares of a frame's factors; a colour on its way counts by how far it has come."""
    first, last = (one(list(COLOURS), name) for name in clip.colour_names)
    start, end = (np.array(COLOURS[name]) for name in clip.colour_names)
    way = float(np.abs(clip.colour[frame] - start).sum() / max(1e-6, np.abs(end - start).sum()))
    falling = clip.weather_amount[frame] > 0.3
    return {
        "season": hats(clip.season[frame], list(SEASONS.values())),
        "day": hats(clip.day[frame], [0.0, 1.0, 2.0, 3.0]),
        "weather": one(WEATHERS, clip.weather if falling else "clear"),
        "object": one(OBJECTS, clip.object),
        "colour": ((1 - way) * first + way * last) * float(clip.object != "none"),
    }


def labelled(seeds: range) -> dict[str, Tensor]:
    """Returns the true shares of every frame: (clips, 16, size) for each factor."""
    rows = [[truth(clip, i) for i in range(clip.frames)] for clip in map(sample, seeds)]
    return {name: torch.from_numpy(np.array([[t[name] for t in clip] for clip in rows], np.float32)) for name in SEEN}


def train(run: Run, clips: np.ndarray, vae: Vae) -> Probe:
    """Trains on rendered frames, half of them as the autoencoder gives them back."""
    probe = Probe()
    loop = Loop(run, "probe", probe, steps=run.steps("probe"), rate=3e-3)
    truths = {} if loop.finished else labelled(range(len(clips)))

    def step(index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        which, when = rng.integers(0, len(clips), BATCH), rng.integers(0, clips.shape[1], BATCH)
        images = to_network(np.stack([clips[c, t] for c, t in zip(which, when, strict=True)]))
        half = BATCH // 2
        images[:half] = vae.decode(vae.encode(images[:half]).transpose(0, 1)[None])[0].transpose(0, 1)
        read = probe(images + 0.02 * torch.randn_like(images))
        losses = {name: -(truths[name][which, when] * read[name]).sum(1).mean() for name in SEEN}
        return {"loss": sum(losses.values(), torch.zeros(())), **losses}

    loop.run(step)
    if not loop.finished:
        with torch.no_grad():
            probe.centre = probe.features(to_network(clips[:512, 0])).mean(0)
        loop.finish()
    return probe.eval().requires_grad_(False)


@torch.inference_mode()
def accuracy(probe: Probe, clips: np.ndarray, truths: dict[str, Tensor], vae: Vae | None = None) -> dict[str, float]:
    """Returns how often the largest share is the true one, over every fifth frame; with `vae`, of decoded frames."""
    right: dict[str, list[Tensor]] = {name: [] for name in SEEN}
    for clip, *shares in zip(clips, *(truths[name] for name in SEEN), strict=True):
        images = to_network(clip[::5])
        if vae is not None:
            images = vae.decode(vae.encode(images).transpose(0, 1)[None])[0].transpose(0, 1)
        read = probe(images)
        for name, true in zip(SEEN, shares, strict=True):
            known = true[::5].sum(1) > 0
            right[name].append((read[name].argmax(1) == true[::5].argmax(1))[known].float())
    return {name: float(torch.cat(values).mean()) for name, values in right.items()}


def save(probe: Probe, path: Path) -> None:
    save_file({name: value.half() for name, value in probe.state_dict().items()}, path)


def load(path: Path) -> Probe:
    probe = Probe()
    probe.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return probe.eval().requires_grad_(False)
