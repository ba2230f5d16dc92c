"""Measures the paper's claims on the mini model: `python -m tools.mini.claims run`, then `... table` or `... publish`.

`run` makes the videos that the results lack, and with `--backfill` again those that lack a measure; `logits` measures what TAR
multiplies, `solvers` what samplers do with few steps. `table` prints the tables, `publish` writes them between the markers
`<!-- claims:NAME -->` of docs/claims.md, docs/solvers.md and the pages in docs/claims.

Every video is one row of JSON, on disk before the next; a run that was stopped goes on where it was. The newest row of a video
counts, and results made with other weights than the bundled ones are refused.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tools.mini.data.render import render
from tools.mini.data.scenes import sample
from tools.mini.training import probe
from vstar_engine import Engine, Sampling, Tar
from vstar_engine.bench.commands.report import between_markers
from vstar_engine.config.sampling import FEW_STEP, FP8
from vstar_engine.machine import threads

from . import logits, solver_tables, solvers
from .measures import measure
from .results import Row, key, rows, without_replaced
from .stories import STORIES
from .tables import COLUMNS, DECEITS, FASTER, LEVELS, PAPER, STRENGTH_LEVELS, STRENGTH_SWEEP, STRENGTHS, SWEEP, tables

ROOT = Path(__file__).parents[3]
DOCUMENTS = (ROOT / "docs" / "claims.md", ROOT / "docs" / "solvers.md", *sorted((ROOT / "docs" / "claims").glob("*.md")))
PROBE = ROOT / "tools" / "mini" / "training" / "probe.safetensors"
RESULTS = Path(__file__).parent / "claims.jsonl"
LOGITS = Path(__file__).parent / "logits.jsonl"
SOLVERS = Path(__file__).parent / "solvers.jsonl"
SOLVER_LATENTS = ROOT / "build" / "solver_latents"
STEPS, GUIDANCE = 10, 6.0
UNTIL = 5  # of 10 steps, as 13 of 25


@dataclass(frozen=True)
class Case:
    """One video: which story told how, by `arm`: clips (the training set's kind), story (rendered), base, vsp, tar or both.

    And two that no measure should be taken in by: still (the rendered story's first frame all along) and shuffled (its frames
    in a random order). `strength` is TAR's, `fast` what `--fast` takes; a video's content does not name what is usual.
    """

    arm: str
    story: int
    seed: int
    frames: int
    sigma: tuple[tuple[int, float], ...] = ()
    fast: str = ""
    strength: float = Tar.strength

    @property
    def content(self) -> dict[str, Any]:
        usual = {"fast": "", "strength": Tar.strength}
        return {name: value for name, value in asdict(self).items() if usual.get(name) != value}

    @property
    def key(self) -> str:
        return key(self.content)

    @property
    def sampling(self) -> Sampling:
        if self.fast == FEW_STEP:
            return Sampling.few()
        names = tuple(name for name in self.fast.split(",") if name and name != FP8)
        return Sampling(steps=STEPS, guidance=GUIDANCE, fast=names)


def in_every_arm(story: int, seed: int, frames: int) -> Iterator[Case]:
    """Yields a story in every arm."""
    yield Case("clips", story, seed, frames)
    yield Case("story", story, seed, frames)
    for arm in ("base", "vsp", "tar", "both"):
        yield Case(arm, story, seed, frames, tuple(PAPER.items()) if arm in ("tar", "both") else ())


def deceits() -> Iterator[Case]:
    """Yields every story's controls, which should raise no measure."""
    for frames in (64, 16):
        for story in range(len(STORIES)):
            yield from (Case(arm, story, 0, frames) for arm in DECEITS)


def stronger() -> Iterator[Case]:
    """Yields every second story under a narrow and a wide sigma at one level, at the paper's strength and a larger one."""
    for frames in (16, 64):
        for strength, level, sigma in product(STRENGTHS, STRENGTH_LEVELS, STRENGTH_SWEEP):
            for story in range(0, len(STORIES), 2):
                yield Case("both", story, 0, frames, ((level, sigma),), strength=strength)


def settings(arm: str) -> Iterator[Case]:
    """Yields every second story under each sigma and set of levels."""
    for levels in [{0: sigma} for sigma in SWEEP] + list(LEVELS):
        for story in range(0, len(STORIES), 2):
            yield Case(arm, story, 0, 64, tuple(levels.items()))


def lossy() -> Iterator[Case]:
    """Yields every fourth story by each of what `--fast` takes."""
    for fast in FASTER:
        for frames in (64, 16):
            for story in range(0, len(STORIES), 4):
                yield Case("both", story, 0, frames, tuple(PAPER.items()), fast)


def cases() -> Iterator[Case]:
    """Yields all videos: 20 stories x 3 seeds at 64 and 16 frames, 10 x 1 at 32 and 48 and for each sigma and set of levels.

    And 10 x 1 at 16 and 64 frames for each strength, 5 x 1 at 64 and 16 frames for what `--fast` takes.
    """
    yield from deceits()
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
    yield from stronger()
    yield from lossy()


@cache
def engine_for(fp8: bool) -> Engine:
    return Engine.load("mini", fp8=fp8)


def until(steps: int) -> int:
    """Returns the last regularised step: the same share of any number of steps."""
    return round(steps * (UNTIL + 1) / STEPS) - 1


def make(engine: Engine, case: Case) -> np.ndarray:
    """Returns the case's frames, uint8 (T, 96, 128, 3)."""
    story = STORIES[case.story]
    if case.arm == "clips":
        return render(sample(20_000_000 + 100 * case.story + case.seed, case.frames))
    seed = 1000 * case.story + case.seed
    if case.arm in ("story", *DECEITS):
        drawn = render(story.clip(case.frames, seed))
        order = {"still": np.zeros(case.frames, int), "shuffled": np.random.default_rng(seed).permutation(case.frames)}
        return drawn[order[case.arm]] if case.arm in order else drawn
    return engine.generate(
        story.texts if case.arm in ("vsp", "both") else story.prompt,
        case.frames,
        seed,
        sampling=case.sampling,
        tar=Tar(dict(case.sigma), case.strength, until(case.sampling.steps)) if case.sigma else None,
    ).frames


@cache
def reader() -> probe.Probe:
    return probe.load(PROBE)


def row(case: Case) -> Row:
    engine = engine_for(FP8 in case.fast.split(","))
    numbers = measure(reader(), STORIES[case.story], make(engine, case))
    return {"case": case.content, "weights": engine.weights, "numbers": numbers}


def lacks(row: Row) -> list[str]:
    """Returns the measures that a row was made without, DreamSim only where it is installed."""
    wanted = dict.fromkeys([*(path[0] for path in COLUMNS.values()), "nearest"])
    if not find_spec("dreamsim"):
        del wanted["dreamsim"]
    return [name for name in wanted if name not in row["numbers"]]


def every_table(results: Path = RESULTS, of_logits: Path = LOGITS, of_solvers: Path = SOLVERS) -> dict[str, str]:
    return tables(rows(results)) | logits.tables(rows(of_logits)) | solver_tables.tables(rows(of_solvers))


def renewed(document: str, made: dict[str, str]) -> str:
    """Returns a document with its tables made anew."""
    return between_markers(document, "claims", made, made.__getitem__)


def run(
    path: Path,
    limit: int | None,
    backfill: bool,
    wanted: Iterable[Case] | None = None,
    executor: Callable[..., Executor] = ProcessPoolExecutor,
) -> None:
    """Makes the videos, `wanted` or all cases, that the file lacks; with `backfill` also those without some measure."""
    found = rows(path)
    lacking = {key(row["case"]): lacks(row) for row in found if lacks(row)}
    done = {key(row["case"]) for row in found} - (lacking.keys() if backfill else set())
    left = [case for case in dict.fromkeys(cases() if wanted is None else wanted) if case.key not in done][:limit]
    # a process a core
    workers = threads.cores().usable
    with executor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool, path.open("a") as file:
        waiting = [pool.submit(row, case) for case in left]
        for made in tqdm(as_completed(waiting), "videos", len(waiting), mininterval=10):
            file.write(json.dumps(made.result()) + "\n")
            file.flush()
    without_replaced(path)
    if lacking and not backfill:
        measures = ", ".join(sorted({name for names in lacking.values() for name in names}))
        print(f"{len(lacking)} videos were measured without {measures}: `run --backfill` makes them again")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.mini.claims", description=__doc__)
    parser.add_argument("command", choices=("run", "logits", "solvers", "table", "publish"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--logits", type=Path, default=LOGITS, help="results of `logits`")
    parser.add_argument("--solvers", type=Path, default=SOLVERS, help="results of `solvers`")
    parser.add_argument("--limit", type=int, help="make at most this many videos; of `solvers` batches")
    parser.add_argument("--backfill", action="store_true", help="make videos again that lack a measure")
    args = parser.parse_args()
    try:
        if args.command == "run":
            run(args.results, args.limit, args.backfill)
        if args.command == "logits":
            logits.run(args.logits, Sampling(steps=STEPS, guidance=GUIDANCE), UNTIL, args.limit)
        if args.command == "solvers":
            solvers.run(args.solvers, SOLVER_LATENTS, args.limit)
        made = every_table(args.results, args.logits, args.solvers)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.command == "publish":
        for path in DOCUMENTS:
            path.write_text(renewed(path.read_text(), made))
            print(f"wrote {path}")
    else:
        print("\n\n".join(filter(None, made.values())))
