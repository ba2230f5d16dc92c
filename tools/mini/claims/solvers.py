"""Samplers on the stories: each with few steps beside DDIM, from the same initial noise and along the same Brownian path.

Told by VSTAR, with TAR and without. Deterministic samplers are compared with 200 steps of DDIM at eta 0, stochastic ones with
200 at eta 1. Every video is one row of JSON; the videos of a story that take the same number of steps are made in one batch.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tools.mini.training import probe
from vstar_engine import Engine, Sampling, Tar
from vstar_engine.artifacts.files import digest_of, write_aside
from vstar_engine.config.request import Request
from vstar_engine.config.sampling import DDIM, DPM, DPM_SDE, LEADING, SPACINGS, TRAILING, TRAINING_STEPS, UNIPC, until_step
from vstar_engine.sampling.batch import Batch, BatchRow
from vstar_engine.sampling.schedule import Schedule, alpha_bar, scale_arr

from .measures import measure
from .results import Row, key, rows, without_replaced
from .stories import STORIES
from .tables import PAPER

LENGTHS = (16, 64)
TOLD = range(0, len(STORIES), 2)
# steps of the published sampler, which the others are compared with
PUBLISHED = 25
# numbers of steps and spacings in the order in which they are measured: those that decide before the others, for all stories
DECIDING = [(12, LEADING), (12, TRAILING), (8, LEADING), (8, TRAILING)]
OTHERS = [(steps, spacing) for steps in (10, 15, 20, 25) for spacing in SPACINGS]
STEPS = tuple(sorted({steps for steps, _ in DECIDING + OTHERS}))
# steps of the latents that a distance is from, on the first stories: they take as long as a story's videos of 12 steps
REFERENCE, REFERRED = 200, TOLD[:3]
GUIDANCE = 6.0
# TAR's last step, as a share of the steps: that of the published 14 of 25
UNTIL = "56%"


@dataclass(frozen=True)
class Arm:
    """A sampler; `eta` is DDIM's."""

    sampler: str
    eta: float = 1.0

    @property
    def stochastic(self) -> bool:
        return self.sampler == DPM_SDE or (self.sampler == DDIM and self.eta > 0)

    def __str__(self) -> str:
        return f"{self.sampler}, eta {self.eta:g}" if self.sampler == DDIM else self.sampler


ODE, SDE = Arm(DDIM, 0.0), Arm(DDIM, 1.0)
ARMS = (ODE, SDE, Arm(DPM), Arm(DPM_SDE), Arm(UNIPC))


@dataclass(frozen=True)
class Case:
    """One video."""

    sampler: str
    eta: float
    spacing: str
    steps: int
    tar: bool
    story: int
    frames: int

    @property
    def arm(self) -> Arm:
        return Arm(self.sampler, self.eta)

    @property
    def request(self) -> Request:
        tar = Tar(PAPER, until_step=until_step(UNTIL, self.steps)) if self.tar else None
        sampling = Sampling(self.steps, self.eta, GUIDANCE, sampler=self.sampler, spacing=self.spacing)
        return Request(tuple(STORIES[self.story].texts), self.frames, 1000 * self.story, sampling=sampling, tar=tar)


def batches() -> Iterator[list[Case]]:
    """All videos, those that are made together: by length, what decides first, with TAR first."""
    for frames, wanted, tar in product(LENGTHS, (DECIDING, OTHERS), (True, False)):
        for (steps, spacing), story in product(wanted, TOLD):
            if (steps, spacing) == DECIDING[0]:
                yield [Case(arm.sampler, arm.eta, LEADING, PUBLISHED, tar, story, frames) for arm in (ODE, SDE)]
            yield [Case(arm.sampler, arm.eta, spacing, steps, tar, story, frames) for arm in ARMS]


class BrownianPath:
    """A Brownian path between every two timesteps, for one video; each sampler reads its steps' noise from it.

    A step's noise is the path's increment over the step divided by its standard deviation. Time is the signal-to-noise ratio,
    in which the variance of what steps add grows evenly; samplers that work with the rescale have it in their ratio.
    """

    def __init__(self, seed: int, shape: Sequence[int]):
        generator = torch.Generator().manual_seed(seed)
        self.each = torch.randn(TRAINING_STEPS - 1, *shape, generator=generator)

    def noise(self, schedule: Schedule, index: int) -> Tensor:
        """Returns the noise of a step, counted from the noisiest."""
        at = len(schedule) - 1 - index
        high, low = int(schedule.timesteps[at]), int(schedule.timesteps[at - 1]) if at else 0
        scale = scale_arr()[:TRAINING_STEPS] if schedule.sampler == DPM_SDE else 1.0
        ratio = alpha_bar() * scale**2 / (1 - alpha_bar())
        variances = torch.from_numpy(-np.diff(ratio)[low:high]).float()
        return torch.einsum("t,t...->...", (variances / variances.sum()).sqrt(), self.each[low:high])


@cache
def reader() -> probe.Probe:
    return probe.load(Path(probe.__file__).with_name("probe.safetensors"))


class Maker:
    """Makes the videos of cases; keeps the last one's Brownian path, and in a folder the latents that distances are between."""

    def __init__(self, engine: Engine, folder: Path):
        self.engine, self.folder = engine, folder
        self.path_of = lru_cache(1)(BrownianPath)

    def sampled(self, cases: list[Case]) -> tuple[Batch, list[BatchRow]]:
        """Samples videos in one batch along the path; returns their rows in the order of the cases."""
        batch = self.engine.begin([case.request for case in cases])
        for row in batch.rows:
            row.noise = partial(self.path_of(row.request.seed + 1, tuple(row.latents.shape)).noise, row.schedule)
        while batch.done < batch.steps:
            batch.step()
        return batch, sorted(batch.rows, key=lambda row: row.index)

    def measured(self, cases: list[Case]) -> Iterator[Row]:
        """Makes videos in one batch and returns their rows of JSON."""
        batch, made = self.sampled(cases)
        for case, row in zip(cases, made, strict=True):
            numbers = measure(reader(), STORIES[case.story], self.engine.finish(batch, row).frames)
            if case.story in REFERRED:
                self.keep(case, row.latents)
            yield {"case": asdict(case), "weights": self.engine.weights, "numbers": numbers}

    def distance(self, case: Case) -> float | None:
        """Returns how far a case's latents are from those of many steps, relative to their size; None where they are lost."""
        if not self.file(case).is_file():
            return None
        exact = replace(case, **vars(SDE if case.arm.stochastic else ODE), spacing=LEADING, steps=REFERENCE)
        if not self.file(exact).is_file():
            _, (row,) = self.sampled([exact])
            self.keep(exact, row.latents)
        ours, wanted = (torch.load(self.file(each)) for each in (case, exact))
        return round(float((ours - wanted).norm() / wanted.norm()), 4)

    def file(self, case: Case) -> Path:
        """Returns where a case's latents are kept."""
        return self.folder / f"{digest_of({'case': asdict(case), 'weights': self.engine.weights})}.pt"

    def keep(self, case: Case, latents: Tensor) -> None:
        """Keeps a case's latents."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with write_aside(self.file(case)) as aside:
            torch.save(latents, aside)


def run(path: Path, folder: Path, limit: int | None) -> None:
    """Makes what is missing from the file, at most `limit` batches, then the distances of those videos; on one thread."""
    torch.set_num_threads(1)
    maker, done = Maker(Engine.load("mini"), folder), {key(row["case"]) for row in rows(path)}
    # the published steps stand in several lists
    left = [wanted for batch in batches() if (wanted := [case for case in batch if key(asdict(case)) not in done])]
    with path.open("a") as file:
        for batch in tqdm(left[:limit], "batches", mininterval=10):
            new = [case for case in batch if key(asdict(case)) not in done]
            for row in maker.measured(new) if new else ():
                file.write(json.dumps(row) + "\n")
                done.add(key(row["case"]))
            file.flush()
        for row in tqdm([row for row in rows(path) if lacks_distance(row)], "distances", mininterval=10):
            if (distance := maker.distance(Case(**row["case"]))) is not None:
                row["numbers"]["distance"] = distance
                file.write(json.dumps(row) + "\n")
                file.flush()
    without_replaced(path)


def lacks_distance(row: Row) -> bool:
    """Returns whether a row of the first stories has no distance yet."""
    return row["case"]["story"] in REFERRED and "distance" not in row["numbers"]
