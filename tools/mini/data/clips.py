"""The training set: rendered clips in one memory-mapped file, made once by all cores."""

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .render import HEIGHT, WIDTH, render
from .scenes import FRAMES, sample


def pixels(seed: int) -> np.ndarray:
    """Renders clip number `seed`: uint8 (16, 96, 128, 3)."""
    return render(sample(seed))


def rendered(folder: Path, seeds: range) -> np.ndarray:
    """Returns uint8 (clips, 16, 96, 128, 3), read from `folder` or rendered into it first."""
    path = folder / f"clips-{seeds.start}-{seeds.stop}.npy"
    if not path.is_file():
        aside = path.with_suffix(".part")
        shape = (len(seeds), FRAMES, HEIGHT, WIDTH, 3)
        out = np.lib.format.open_memmap(aside, mode="w+", dtype=np.uint8, shape=shape)
        with ProcessPoolExecutor() as pool:
            made: Iterable[np.ndarray] = pool.map(pixels, seeds, chunksize=16)
            for index, clip in enumerate(tqdm(made, "render", len(seeds), mininterval=5)):
                out[index] = clip
        out.flush()
        aside.rename(path)
    return np.load(path, mmap_mode="r")
