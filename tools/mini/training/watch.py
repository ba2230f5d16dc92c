"""Looks at a training run so far; `python -m tools.mini.training.watch OUT` writes OUT/watch.png.

Whether frames hang together, whether they do so through temporal attention, the sign of its row maxima, what TAR changes.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from tools.mini.claims.stories import STORIES
from vstar_engine import Engine, Sampling, Tar
from vstar_engine.analysis import attention_maps, similarity
from vstar_engine.config.models import model_named
from vstar_engine.loading import LoadedModel
from vstar_engine.networks.blocks import TemporalTransformer
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.networks.unet import UNet
from vstar_engine.networks.vae import Vae
from vstar_engine.video import contact_sheet

SEED, POSITIONS = 0, range(0, 192, 12)


def trained(folder: Path) -> Engine:
    """Puts an engine together from the last checkpoints; the UNet's averaged weights if it is still in training."""
    spec = model_named("mini")
    vae, text, unet = Vae(spec.vae), TextTower(spec.text), UNet(spec.unet)
    for module, part, prefix in ((vae, "vae", "vae."), (text, "text", "tower."), (unet, "unet", "")):
        kept = torch.load(folder / f"{part}.pt", weights_only=True)
        weights = kept.get("averaged") or kept["module"]
        module.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        module.eval().requires_grad_(False)
        print(f"{part}: step {kept['index']}")
    return Engine(LoadedModel(spec, text, unet, vae, torch.device("cpu"), torch.float32, "in training"))


@contextmanager
def without_temporal_attention(unet: nn.Module) -> Iterator[None]:
    """Takes every temporal transformer out."""
    layers = [layer for layer in unet.modules() if isinstance(layer, TemporalTransformer)]
    handles = [layer.register_forward_hook(lambda module, args, output: args[0]) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.mini.training.watch", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--story", type=int, default=0)
    args = parser.parse_args()
    engine, story = trained(args.out), STORIES[args.story]
    sampling, tar = Sampling(steps=args.steps, guidance=args.guidance), Tar(until_step=args.steps // 2)

    def made(told: str | list[str], frames: int, tar: Tar | None) -> np.ndarray:
        return engine.generate(told, frames, SEED, sampling=sampling, tar=tar).frames

    videos = {"one prompt, 16 frames": made(story.prompt, 16, None)}
    with without_temporal_attention(engine.denoiser):  # type: ignore[arg-type]
        videos["the same without temporal attention"] = made(story.prompt, 16, None)
    with attention_maps.recorded(engine.denoiser, POSITIONS) as recording:  # type: ignore[arg-type]
        videos["one prompt"] = made(story.prompt, args.frames, None)
    videos["one prompt, TAR"] = made(story.prompt, args.frames, tar)
    videos["states"] = made(story.texts, args.frames, None)
    videos["states, TAR"] = made(story.texts, args.frames, tar)
    for title, frames in videos.items():
        matrix = similarity.cosine(similarity.pixels(frames))
        print(f"{title}: neighbours {similarity.neighbours(matrix):.3f}, dynamics {similarity.dynamics(matrix):.3f}")
    for level in range(engine.spec.unet.levels):
        seen = [one for one in recording.attentions if one.level == level]
        positive, spread = (np.mean([getattr(one, name) for one in seen]) for name in ("positive", "spread"))
        attended = np.mean([attention_maps.entropy(one.probs) for one in seen])
        print(f"level {level}: {positive:.0%} of row maxima positive, logit spread {spread:.2f}, {attended:.1f} frames seen")
    rows = [contact_sheet(frames, max(1, len(frames) // 8), 8) for frames in videos.values()]
    Image.fromarray(np.concatenate(rows)).save(args.out / "watch.png")


if __name__ == "__main__":
    main()
