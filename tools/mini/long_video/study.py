"""Measures long videos on the mini model: `python -m tools.mini.long_video run`, then `... table` or `... publish`.

`run` makes the videos that the results lack, a row each, on disk before the next, so a run that was stopped goes on where it
was; `--limit` bounds their number. `publish` writes the tables between the markers of docs/long_video.md, and `sheet` draws the
frames of one story in every arm.
"""

import argparse
import json
import math
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from tools.mini.claims.measures import measure
from tools.mini.claims.results import Row, key, rows, without_replaced
from tools.mini.claims.stories import STORIES
from tools.mini.claims.study import reader
from vstar_engine import Engine
from vstar_engine.analysis import similarity
from vstar_engine.analysis.metrics.seams import seams
from vstar_engine.analysis.metrics.summary import summary
from vstar_engine.bench.commands.report import between_markers

from .arms import FIRST, LONG, Case, cases
from .tables import tables

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs" / "long_video.md"
SHEET = ROOT / "docs" / "long_video.png"
RESULTS = Path(__file__).parent / "long_video.jsonl"
STORY_NUMBERS = ("alignment", "stated", "visited", "held")
# of a sheet's rows: a frame in so many
SHEET_EVERY = 20


@cache
def engine() -> Engine:
    return Engine.load("mini")


def row(case: Case, folder: Path | None = None) -> Row:
    """Makes a video and measures it; `folder` keeps its frames as an mp4."""
    start = time.process_time()
    video = engine().run(case.request)
    seconds = time.process_time() - start
    if folder is not None:
        video.save(folder / f"{case.arm.replace(', ', '-')}-{case.story}-{case.frames}-{case.tar}.mp4")
    numbers = summary(video.frames, case.plan.borders)
    alike = similarity.cosine(similarity.pixels(video.frames))
    numbers["start_ratio"] = seams(alike, case.plan.starts[1:]).ratio
    told = measure(reader(), STORIES[case.story], video.frames)
    numbers |= {name: told[name] for name in STORY_NUMBERS}
    plain = {name: _plain(value) for name, value in numbers.items()}
    return {"case": case.content, "weights": engine().weights, "cpu_seconds": round(seconds, 1), "numbers": plain}


def _plain(value: Any) -> Any:
    """Returns a number that JSON has, in five digits."""
    if isinstance(value, float | np.floating):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def run(path: Path, limit: int | None, folder: Path | None) -> None:
    """Makes what is missing from the file, in one process and one thread."""
    torch.set_num_threads(1)
    done = {key(made["case"]) for made in rows(path)}
    left = [case for case in cases() if case.key not in done][:limit]
    with path.open("a") as file:
        for case in tqdm(left, "videos", mininterval=10):
            file.write(json.dumps(row(case, folder)) + "\n")
            file.flush()
    without_replaced(path)


def sheet(path: Path, story: int) -> None:
    """Draws a story in 240 frames, an arm a row, in the order of the table."""
    strips = [engine().run(Case(arm, story, 0, LONG, True).request).frames[::SHEET_EVERY] for arm in FIRST]
    Image.fromarray(np.concatenate([np.concatenate(list(strip), axis=1) for strip in strips])).save(path)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.mini.long_video", description=__doc__)
    parser.add_argument("command", choices=("run", "table", "publish", "sheet"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--limit", type=int, help="make at most this many videos")
    parser.add_argument("--videos", type=Path, metavar="DIR", help="keep the videos in this folder")
    parser.add_argument("--story", type=int, default=0, help="of the sheet")
    args = parser.parse_args()
    try:
        if args.command == "sheet":
            sheet(SHEET, args.story)
            return
        if args.command == "run":
            run(args.results, args.limit, args.videos)
        made = tables(rows(args.results))
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.command == "publish":
        DOCUMENT.write_text(between_markers(DOCUMENT.read_text(), "long_video", made, made.__getitem__))
        print(f"wrote {DOCUMENT}")
    else:
        print("\n\n".join(f"{name}\n\n{text}" for name, text in made.items()))
