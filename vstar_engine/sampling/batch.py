"""Videos of the same frames, size and steps on their way through one denoiser, each with settings of its own."""

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vstar_engine.config.models import Spec
from vstar_engine.config.request import Request
from vstar_engine.networks.denoiser import Denoiser
from vstar_engine.networks.precomputed import Clock
from vstar_engine.networks.step import Call, Given, Step, Texts
from vstar_engine.prompting.embeddings import Embeddings

from . import tar
from .ddim import coefficients
from .schedule import Schedule
from .step_cache import StepCache


@dataclass(eq=False)
class Row:
    """One video of a batch: what it hears, where its noise comes from, and how far it has come.

    `index` is its place among the requests and `held` the embeddings it brought; context and unconditional are
    (1, 1 or T, 77, C), latents and clean (what the last step took for the finished latents) (1, 4, T, h, w). `drawn` is
    noise of the step to come.
    """

    index: int
    request: Request
    held: Embeddings | None
    context: Tensor
    unconditional: Tensor
    schedule: Schedule
    generator: torch.Generator
    latents: Tensor
    clean: Tensor | None = None
    drawn: Tensor | None = None

    @staticmethod
    def of(index: int, request: Request, held: Embeddings | None, context: Tensor, unconditional: Tensor, spec: Spec) -> "Row":
        """Draws the first noise of a request whose size is filled in; on the CPU, so that a seed is the same everywhere."""
        assert request.size is not None
        generator = torch.Generator().manual_seed(request.seed)
        cells = (side // spec.vae.factor for side in request.size)
        latents = torch.randn(1, spec.unet.in_channels, request.frames, *cells, generator=generator)
        schedule = Schedule.of(request.sampling)
        return Row(index, request, held, context, unconditional, schedule, generator, latents.to(context.device))

    def draw(self, done: int) -> None:
        """Draws the noise of the step after `done` ones, if it takes any; in memory that a GPU reads without waiting."""
        if self.drawn is None and done < len(self.schedule) and self.schedule.sigma[len(self.schedule) - 1 - done] > 0:
            pinned = self.latents.is_cuda
            self.drawn = torch.randn(self.latents.shape, generator=self.generator, pin_memory=pinned)


@dataclass(frozen=True)
class Tables:
    """What some rows take at every step to come, made once: (steps, rows, ...) on the device, from the first step on."""

    clock: Clock
    fps: Tensor
    tar: Tensor
    coefficients: Tensor

    @staticmethod
    def of(rows: Sequence[Row], denoiser: Denoiser, spec: Spec) -> "Tables":
        requests, schedule, device = [row.request for row in rows], rows[0].schedule, rows[0].latents.device
        steps, levels = len(schedule), spec.unet.levels
        timesteps = torch.from_numpy(schedule.timesteps[::-1].copy()).to(device)
        fps = torch.tensor([request.sampling.fps_condition for request in requests], device=device)
        g = torch.stack([tar.tables(request.tar, levels, request.frames, steps) for request in requests], dim=1)
        weights = torch.stack([coefficients(row.schedule, row.request.sampling.guidance) for row in rows], dim=1)
        return Tables(denoiser.clock(timesteps, fps), fps, g.to(device), weights.float().to(device))


@dataclass
class Batch:
    """Rows that share each call of the denoiser. `done` counts steps, `seconds` is what each stage took."""

    denoiser: Denoiser
    spec: Spec
    dtype: torch.dtype
    rows: list[Row]
    done: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"text": 0.0, "denoise": 0.0})
    cache: StepCache | None = None
    _tables: Tables | None = None
    _plans: dict[tuple[int, ...], tuple[list[tuple[tuple[int, ...], Texts]], Tensor]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.rows[0].schedule)

    def drop(self, index: int) -> None:
        """Takes a video out; the others go on as they would have."""
        self.rows = [row for row in self.rows if row.index != index]
        self._tables = None
        self._plans.clear()

    @torch.inference_mode()
    def step(self) -> None:
        """Takes every row one step further: guidance branches in one call, or in two where a row asks for that."""
        start = time.perf_counter()
        guided = tuple(i for i, row in enumerate(self.rows) if row.request.sampling.guided(self.done))
        if guided not in self._plans:
            self._plans[guided] = self._plan(guided)
        calls, plain = self._plans[guided]
        names = [self._names(rows, texts) for rows, texts in calls]
        whole = self.rows[0].request.sampling.whole(self.done)
        made = tuple(
            Call(rows, texts, None if self.cache is None else self.cache.deep(branches, whole))
            for (rows, texts), branches in zip(calls, names, strict=True)
        )
        step = Step(self.dtype, *self._given(made, plain))
        latents, clean, *features = self.denoiser.run_step(step)
        for row, x, x0 in zip(self.rows, latents.split(1), clean.split(1), strict=True):
            row.latents, row.clean = x, x0
        if self.cache and whole:
            for branches, kept in zip(names, features, strict=True):
                self.cache.keep(branches, kept)
        self.done += 1
        # a GPU still computes meanwhile
        for row in self.rows:
            row.draw(self.done)
        self.seconds["denoise"] += time.perf_counter() - start

    def _given(self, calls: tuple[Call, ...], plain: Tensor) -> tuple[Clock, tuple[Call, ...], Given]:
        if self._tables is None:
            self._tables = Tables.of(self.rows, self.denoiser, self.spec)
        known, at = self._tables, self.done
        latents = torch.cat([row.latents for row in self.rows]) if len(self.rows) > 1 else self.rows[0].latents
        rows = (known.clock.table[at], known.fps, known.tar[at], known.coefficients[at])
        return known.clock, calls, Given(latents, *rows, self._noise(latents), plain)

    def _noise(self, latents: Tensor) -> Tensor:
        """Returns the noise of this step on the device, zeros for rows that take none."""
        noise = torch.zeros_like(latents)
        for place, row in zip(noise.split(1), self.rows, strict=True):
            row.draw(self.done)
            if row.drawn is not None:
                place.copy_(row.drawn, non_blocking=True)
                row.drawn = None
        return noise

    def _plan(self, guided: tuple[int, ...]) -> tuple[list[tuple[tuple[int, ...], Texts]], Tensor]:
        """Returns each call's rows and texts, and which prediction each row has for what it hears nothing in."""
        every = tuple(range(len(self.rows)))
        heard, unheard = [row.context for row in self.rows], [self.rows[i].unconditional for i in guided]
        if not all(row.request.sampling.batch_guidance for row in self.rows):
            calls = [(every, heard), (guided, unheard)]
        elif guided == every:  # what the branches of every video share is computed once
            calls = [(every, [*heard, *unheard])]
        else:
            calls = [((*every, *guided), [*heard, *unheard])]
        places = {row: len(every) + place for place, row in enumerate(guided)}
        plain = torch.tensor([places.get(i, i) for i in every], device=self.rows[0].latents.device)
        return [(rows, Texts(tuple(texts))) for rows, texts in calls if texts], plain

    def _names(self, rows: tuple[int, ...], texts: Texts) -> list[Hashable]:
        """Names the branches of a call: the video, and whether it hears its own text."""
        rows = rows * (len(texts.contexts) // len(rows))
        return [(self.rows[i].index, text is self.rows[i].context) for i, text in zip(rows, texts.contexts, strict=True)]
