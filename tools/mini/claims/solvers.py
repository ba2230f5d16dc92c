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
from vstar_engine.config.sampling import DDIM, DPM, DPM_SDE, LEADING, SPACINGS, TRAINING_STEPS, UNIPC, until_step
from vstar_engine.sampling.batch import Batch, BatchRow
from vstar_engine.sampling.schedule import Schedule, alpha_bar, scale_arr

from .measures import measure
from .results import Row, key, rows
from .stories import STORIES
from .tables import PAPER

LENGTHS = (16, 64)
TOLD = range(0, len(STORIES), 2)
# numbers of steps in the order in which they are measured: those that decide for all stories before the others
DECIDING, OTHERS, PUBLISHED = (12, 8), (10, 15, 20, 25), 25
STEPS = tuple(sorted(DECIDING + OTHERS))
# steps of what the others are compared with, on the first stories: one takes as long as eight videos of 25 steps
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
    """All videos, those that are made together: what decides first, with TAR first, then the other numbers of steps."""
    for frames, wanted, tar in product(LENGTHS, (DECIDING, OTHERS), (True, False)):
        for story in TOLD:
            yield [Case(*vars(arm).values(), LEADING, PUBLISHED, tar, story, frames) for arm in (ODE, SDE)]
            for steps in wanted:
                arms = product(SPACINGS, ARMS)
                yield [Case(*vars(arm).values(), spacing, steps, tar, story, frames) for spacing, arm in arms]


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
    """Makes the videos of cases; keeps the last one's Brownian path, and in a folder what the others are compared with."""

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

    def reference(self, case: Case) -> Tensor:
        """Returns the latents that a case's are compared with, as they were sampled or from the folder."""
        arm = SDE if case.arm.stochastic else ODE
        exact = replace(case, **vars(arm), spacing=LEADING, steps=REFERENCE)
        name = digest_of({"case": asdict(exact), "weights": self.engine.weights})
        path = self.folder / f"{name}.pt"
        if not path.is_file():
            _, (row,) = self.sampled([exact])
            self.folder.mkdir(parents=True, exist_ok=True)
            with write_aside(path) as aside:
                torch.save(row.latents, aside)
        return torch.load(path)

    def measured(self, cases: list[Case]) -> Iterator[Row]:
        """Makes videos in one batch and returns their rows of JSON."""
        batch, made = self.sampled(cases)
        for case, row in zip(cases, made, strict=True):
            numbers = measure(reader(), STORIES[case.story], self.engine.finish(batch, row).frames)
            if case.story in REFERRED:
                exact = self.reference(case)
                numbers["distance"] = round(float((row.latents - exact).norm() / exact.norm()), 4)
            yield {"case": asdict(case), "weights": self.engine.weights, "numbers": numbers}


def run(path: Path, folder: Path, limit: int | None) -> None:
    """Makes what is missing from the file, at most `limit` batches, on one thread."""
    torch.set_num_threads(1)
    done = {key(row["case"]) for row in rows(path)}
    maker = Maker(Engine.load("mini"), folder)
    left = [wanted for batch in batches() if (wanted := [case for case in batch if key(asdict(case)) not in done])]
    with path.open("a") as file:
        for batch in tqdm(left[:limit], "batches", mininterval=10):
            # the published number of steps stands in several lists
            new = [case for case in batch if key(asdict(case)) not in done]
            for row in maker.measured(new) if new else ():
                file.write(json.dumps(row) + "\n")
                done.add(key(row["case"]))
            file.flush()
