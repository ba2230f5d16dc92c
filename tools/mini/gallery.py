"""Makes pictures with the mini model in docs/gallery: `python -m tools.mini.gallery`, a few minutes on two cores.

Contact sheets of one prompt and of VSTAR, similarity matrices of their frames, and temporal attention without and with TAR;
and demo.png, the sheet that `make demo` writes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageDraw

from vstar_engine import Engine, Sampling, Tar
from vstar_engine.analysis import attention_maps, similarity
from vstar_engine.networks.unet import UNet
from vstar_engine.video import Video, contact_sheet

FOLDER = Path(__file__).parents[2] / "docs" / "gallery"
FRAMES, SEED, SAMPLING, PAPER = 64, 0, Sampling(guidance=6.0), Tar()
STORIES = {
    "winter_to_spring": (
        "a landscape transitioning from winter to spring",
        [
            "a landscape covered in thick snow, bare trees",
            "the snow melts, patches of brown grass",
            "green shoots and small buds",
            "flowers bloom, trees adorned with fresh leaves",
            "a lush green meadow in full spring",
        ],
    ),
    "day_to_night": (
        "a landscape transitioning from day to night, a white house",
        ["a landscape by day, a white house", "a landscape at sunset, a white house", "a landscape at night, a white house"],
    ),
    "red_to_blue": (
        "a summer landscape by day, a red balloon turning blue",
        ["a summer landscape by day, a red balloon in the sky", "a summer landscape by day, a blue balloon in the sky"],
    ),
}
DEMO, VSTAR = "winter_to_spring", "states and TAR (VSTAR)"  # what `make demo` makes
PASS, POSITIONS = 4, range(0, 192, 24)
CELL, GAP, TITLE = 4, 16, 22
STOPS = np.array([[13, 20, 48], [178, 70, 60], [247, 178, 70], [255, 250, 230]], dtype=float)


def heat(values: np.ndarray, low: float, high: float) -> Image.Image:
    """Colours a matrix from dark blue (`low`) over orange to white (`high`)."""
    index = np.clip((values - low) / (high - low) * 3, 0, 2.999)[..., None]
    below = index.astype(int)[..., 0]
    colours = STOPS[below] * (1 - index + below[..., None]) + STOPS[below + 1] * (index - below[..., None])
    size = (values.shape[1] * CELL, values.shape[0] * CELL)
    return Image.fromarray(colours.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def beside(panels: dict[str, Image.Image]) -> Image.Image:
    """Puts titled pictures side by side on white."""
    width = sum(panel.width + GAP for panel in panels.values()) + GAP
    sheet = Image.new("RGB", (width, max(panel.height for panel in panels.values()) + TITLE + GAP), "white")
    left = GAP
    for title, panel in panels.items():
        ImageDraw.Draw(sheet).text((left, 6), title, fill="black")
        sheet.paste(panel, (left, TITLE))
        left += panel.width + GAP
    return sheet


def watched(engine: Engine, told: str | Sequence[str], tar: Tar | None) -> tuple[Video, dict[int, np.ndarray]]:
    """Makes a video; returns it and, per level, the mean attention (T, T) of pass `PASS` given the prompt."""
    with attention_maps.recorded(cast(UNet, engine.denoiser), POSITIONS) as recording:
        video = engine.generate(told, FRAMES, SEED, sampling=SAMPLING, tar=tar)
    seen = [one for one in recording.attentions if one.step == PASS]
    levels = {level: [one.probs[0].mean(0) for one in seen if one.level == level] for level in range(engine.spec.unet.levels)}
    return video, {level: torch.stack(maps).mean(0).numpy() for level, maps in levels.items()}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    engine = Engine.load("mini")
    for name, (prompt, states) in STORIES.items():
        arms = {
            "one prompt": (prompt, None),
            "one prompt, TAR": (prompt, PAPER),
            "states (VSP)": (states, None),
            VSTAR: (states, PAPER),
        }
        made = {title: watched(engine, told, tar) for title, (told, tar) in arms.items()}
        if name == DEMO:
            made[VSTAR][0].save(FOLDER / "demo.png")
        sheets = {title: Image.fromarray(contact_sheet(made[title][0].frames)) for title in ("one prompt", VSTAR)}
        beside(sheets).save(FOLDER / f"{name}.png", optimize=True)
        alike = {title: similarity.cosine(similarity.pixels(video.frames)) for title, (video, _) in made.items()}
        beside({title: heat(matrix, 0.0, 1.0) for title, matrix in alike.items()}).save(
            FOLDER / f"{name}_similarity.png", optimize=True
        )
        for level in (0, 1):
            # the square root shows what is small; each by its own maximum, as the page says
            maps = {title: np.sqrt(levels[level] / levels[level].max()) for title, (_, levels) in made.items()}
            panels = {title: heat(matrix, 0.0, 1.0) for title, matrix in maps.items()}
            beside(panels).save(FOLDER / f"{name}_attention_{level}.png", optimize=True)


if __name__ == "__main__":
    main()
