"""Draws docs/attention.png: a temporal attention of 64 frames without and with TAR, by the op the engine runs.

    python docs/attention_picture.py

Queries and keys drift slowly over the frames, as a trained model's do, and differ a little from frame to frame.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent))

from vstar_engine.kernels.temporal_attention import temporal_attention_probs
from vstar_engine.tar import toeplitz

FRAMES, POSITIONS, HEADS, HEAD_DIM, CELL, GAP, TITLE = 64, 32, 5, 64, 4, 24, 26


def drifting(generator: torch.Generator) -> torch.Tensor:
    """Makes (1, FRAMES, POSITIONS, HEADS, HEAD_DIM) features: a common part and a small walk through time."""
    common = torch.randn(1, 1, POSITIONS, HEADS, HEAD_DIM, generator=generator)
    steps = torch.randn(1, FRAMES, POSITIONS, HEADS, HEAD_DIM, generator=generator) * 0.04
    return common + steps.cumsum(dim=1)


def heat(probs: torch.Tensor) -> Image.Image:
    """Colours a (FRAMES, FRAMES) attention matrix from dark blue over orange to white by its square root."""
    level = np.sqrt(probs.numpy() / probs.numpy().max())[..., None]
    stops = np.array([[13, 20, 48], [178, 70, 60], [247, 178, 70], [255, 250, 230]], dtype=float)
    index = np.clip(level * 3, 0, 2.999)
    low = index.astype(int)
    colours = stops[low[..., 0]] * (1 - index + low) + stops[low[..., 0] + 1] * (index - low)
    return Image.fromarray(colours.astype(np.uint8)).resize((FRAMES * CELL, FRAMES * CELL), Image.Resampling.NEAREST)


def main() -> None:
    generator = torch.Generator().manual_seed(2)
    q = drifting(generator)
    k = q + torch.randn(q.shape, generator=generator) * 0.1
    panels = {
        "without TAR": torch.zeros(FRAMES),
        "TAR, sigma 8": toeplitz(FRAMES, 8.0),
        "TAR, sigma 1": toeplitz(FRAMES, 1.0),
    }
    side = FRAMES * CELL
    picture = Image.new("RGB", (len(panels) * (side + GAP) + GAP, side + TITLE + GAP), "white")
    pen = ImageDraw.Draw(picture)
    for i, (title, g) in enumerate(panels.items()):
        probs = temporal_attention_probs(q, k, g, list(range(POSITIONS)))[0].mean(dim=0)
        left = GAP + i * (side + GAP)
        picture.paste(heat(probs), (left, TITLE))
        pen.text((left, 8), title, fill="black")
    picture.save(Path(__file__).parent / "attention.png", optimize=True)


if __name__ == "__main__":
    main()
