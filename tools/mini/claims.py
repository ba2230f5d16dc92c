"""Measures the paper's claims on the mini model: `python -m tools.mini.claims run`, then `... table` or `... publish`.

`table` prints the tables, `publish` writes them between the markers `<!-- claims:NAME -->` of README.md and docs/claims.md.

Every video is one row of JSON, on disk before the next; a run that was stopped goes on where it was.
"""

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vstar_engine import Engine, Sampling, Tar, analysis
from vstar_engine.bench.report import between_markers
from vstar_engine.config import FEW_STEP, FP8
from vstar_engine.text import anchor_frames

from . import probe
from .render import render
from .scenes import sample
from .stories import STORIES, Story
from .tables import FASTER, LEVELS, PAPER, SWEEP, tables
from .train_vae import to_network

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "claims.md")
PROBE = Path(__file__).parent / "probe.safetensors"
RESULTS = Path(__file__).parent / "claims.jsonl"
STEPS, GUIDANCE = 10, 6.0
UNTIL = 5  # of 10 steps, as 13 of 25
INTERVALS = (1, 2, 4, 8, 12, 15, 16, 24, 31, 32, 40, 47, 48, 56, 63)


@dataclass(frozen=True)
class Case:
    """One video: which story told how, by `arm`: clips (the training set's kind), story (rendered), base, vsp, tar or both.

    `fast` is what `--fast` takes; an exact video's content does not name it.
    """

    arm: str
    story: int
    seed: int
    frames: int
    sigma: tuple[tuple[int, float], ...] = ()
    fast: str = ""

    @property
    def content(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "fast" or value}

    @property
    def key(self) -> str:
        return json.dumps(self.content, sort_keys=True)

    @property
    def sampling(self) -> Sampling:
        if self.fast == FEW_STEP:
            return Sampling.few()
        names = tuple(name for name in self.fast.split(",") if name and name != FP8)
        return Sampling(steps=STEPS, guidance=GUIDANCE, fast=names)


def in_every_arm(story: int, seed: int, frames: int) -> Iterator[Case]:
    """A story in every arm."""
    yield Case("clips", story, seed, frames)
    yield Case("story", story, seed, frames)
    for arm in ("base", "vsp", "tar", "both"):
        yield Case(arm, story, seed, frames, tuple(PAPER.items()) if arm in ("tar", "both") else ())


def settings(arm: str) -> Iterator[Case]:
    """Every second story under each sigma and set of levels."""
    for levels in [{0: sigma} for sigma in SWEEP] + list(LEVELS):
        for story in range(0, len(STORIES), 2):
            yield Case(arm, story, 0, 64, tuple(levels.items()))


def lossy() -> Iterator[Case]:
    """Every fourth story by each of what `--fast` takes."""
    for fast in FASTER:
        for frames in (64, 16):
            for story in range(0, len(STORIES), 4):
                yield Case("both", story, 0, frames, tuple(PAPER.items()), fast)


def cases() -> Iterator[Case]:
    """All videos: 20 stories x 3 seeds at 64 and 16 frames, 10 x 1 at 32 and 48 frames and for each sigma and set of levels.

    And 5 x 1 at 64 and 16 frames for what `--fast` takes.
    """
    for seed in range(3):
        for frames in (64, 16):
            for story in range(len(STORIES)):
                yield from in_every_arm(story, seed, frames)
        if seed == 0:
            for frames in (32, 48):
                for story in range(0, len(STORIES), 2):
                    yield from in_every_arm(story, seed, frames)
            yield from settings("both")
    yield from settings("tar")
    yield from lossy()


@cache
def engine_for(fp8: bool) -> Engine:
    return Engine.load("mini", fp8=fp8)


def until(steps: int) -> int:
    """The last regularised step: the same share of any number of steps."""
    return round(steps * (UNTIL + 1) / STEPS) - 1


def make(engine: Engine, case: Case) -> np.ndarray:
    """The case's frames, uint8 (T, 96, 128, 3)."""
    story = STORIES[case.story]
    if case.arm == "clips":
        return render(sample(20_000_000 + 100 * case.story + case.seed, case.frames))
    if case.arm == "story":
        return render(story.clip(case.frames, 1000 * case.story + case.seed))
    return engine.generate(
        story.texts if case.arm in ("vsp", "both") else story.prompt,
        case.frames,
        1000 * case.story + case.seed,
        sampling=case.sampling,
        tar=Tar(dict(case.sigma), until_step=until(case.sampling.steps)) if case.sigma else None,
    ).frames


def in_order(nearest: np.ndarray, states: int) -> int:
    """How many of the states 0, 1, ... are visited one after the other (the longest rising sequence, each state once)."""
    best = np.zeros(states + 1, int)
    for state in nearest:
        best[state + 1] = max(best[state + 1], best[: state + 1].max() + 1)
    return int(best.max())


def measure(reader: probe.Probe, story: Story, frames: np.ndarray) -> dict[str, Any]:
    """All numbers of one video."""
    images = to_network(frames)
    with torch.inference_mode():
        read = {name: shares.exp().numpy() for name, shares in reader(images).items()}
        features = reader.centred(images).numpy()
    similarity = {
        "pixels": analysis.cosine(analysis.pixels(frames)),
        "features": analysis.cosine(features),
        "factors": np.mean([analysis.overlap(shares) for shares in read.values()], axis=0),
    }
    if find_spec("dreamsim"):
        similarity["dreamsim"] = analysis.cosine(analysis.dreamsim(frames))
    told = [state.shares() for state in story.states]
    # (T, K): how much of what state k says is seen in frame t
    seen = np.stack([np.mean([np.minimum(read[n], s).sum(1) for n, s in state.items()], axis=0) for state in told], 1)
    where = anchor_frames(len(told), len(frames))
    weights = np.stack([np.interp(np.arange(len(frames)), where, row) for row in np.eye(len(told))], 1)
    aligned = [np.minimum(read[name], weights @ np.stack([state[name] for state in told])).sum(1).mean() for name in told[0]]
    nearest = seen.argmax(1)
    numbers: dict[str, Any] = {}
    for name, matrix in similarity.items():
        curve = analysis.by_interval(matrix)
        numbers[name] = {
            "dynamics": analysis.dynamics(matrix),
            "neighbours": analysis.neighbours(matrix),
            "curve": {str(d): curve[d] for d in INTERVALS if d < len(curve)},
        }
    return rounded(
        numbers
        | {
            "visited": in_order(nearest, len(told)) / len(told),
            "at_anchors": float(np.mean(nearest[where] == np.arange(len(told)))),
            "alignment": float(np.mean(aligned)),
            "cuts": len(analysis.scene_cuts(frames)),
        }
    )


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return round(float(value), 4)


_reader: probe.Probe


def start() -> None:
    """Prepares a process, which uses one core; it loads each network when it first needs it."""
    global _reader
    torch.set_num_threads(1)
    _reader = probe.load(PROBE)


def row(case: Case) -> dict[str, Any]:
    engine = engine_for(FP8 in case.fast.split(","))
    numbers = measure(_reader, STORIES[case.story], make(engine, case))
    return {"case": case.content, "weights": engine.weights, "numbers": numbers}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def renewed(document: str, found: list[dict[str, Any]]) -> str:
    """A document with its tables made anew."""
    made = tables(found)
    return between_markers(document, "claims", made, made.__getitem__)


def run(path: Path, limit: int | None) -> None:
    """Makes what is missing from the file."""
    done = {json.dumps(row["case"], sort_keys=True) for row in rows(path)}
    left = [case for case in dict.fromkeys(cases()) if case.key not in done][:limit]
    with ProcessPoolExecutor(os.cpu_count(), initializer=start) as pool, path.open("a") as file:
        waiting = [pool.submit(row, case) for case in left]
        for made in tqdm(as_completed(waiting), "videos", len(waiting), mininterval=10):
            file.write(json.dumps(made.result()) + "\n")
            file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.mini.claims", description=__doc__)
    parser.add_argument("command", choices=("run", "table", "publish"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--limit", type=int, help="make at most this many videos")
    args = parser.parse_args()
    if args.command == "run":
        run(args.results, args.limit)
    if args.command == "publish":
        for path in DOCUMENTS:
            path.write_text(renewed(path.read_text(), rows(args.results)))
            print(f"wrote {path}")
    else:
        print("\n\n".join(filter(None, tables(rows(args.results)).values())))


if __name__ == "__main__":
    main()
