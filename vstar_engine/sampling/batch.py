"""Batched sampling: videos of the same frames, size and steps share each call of the denoiser, with settings of their own."""

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vstar_engine.config.models import Spec
from vstar_engine.config.request import Request
from vstar_engine.machine.host_settings import undisturbed
from vstar_engine.networks.denoiser import Denoiser
from vstar_engine.networks.precomputed import TimestepTable
from vstar_engine.networks.step import Conditioning, NetworkCall, OnPart, SamplingStep, StepInputs
from vstar_engine.prompting.embeddings import Embeddings
from vstar_engine.prompting.interpolation import FrameTexts

from . import tar
from .ddim import SamplingLoop, Trajectory
from .initial_noise import initial_noise
from .schedule import Schedule
from .step_cache import StepCache


@dataclass(eq=False, kw_only=True)
class BatchRow(Trajectory):
    """One video of a batch, with latents (1, 4, T, h, w).

    `index` is its place among the requests, `generator` draws its noise where no other row's does, `held` are the embeddings
    that the request came with.
    `context` and `uncond_context` are (1, 1 or T, 77, C), or `FrameTexts` that those of a window are made of.
    """

    index: int
    generator: torch.Generator | None = None
    request: Request
    held: Embeddings | None
    context: Any
    uncond_context: Any

    @staticmethod
    def of(
        index: int,
        request: Request,
        held: Embeddings | None,
        context: Tensor | FrameTexts,
        uncond_context: Tensor | FrameTexts,
        spec: Spec,
    ) -> "BatchRow":
        """Draws the initial noise of a request with a size, on the CPU, so that a seed gives the same noise on every device."""
        assert request.size is not None
        generator = torch.Generator().manual_seed(request.seed)
        cells = (side // spec.vae.factor for side in request.size)
        device = (context.anchors if isinstance(context, FrameTexts) else context).device
        latents = initial_noise(request, (1, spec.unet.in_channels, request.frames, *cells), generator)
        # a GPU reads pinned memory without waiting
        noise = partial(torch.randn, latents.shape, generator=generator, dtype=torch.float32, pin_memory=device.type == "cuda")
        return BatchRow(
            latents.to(device),
            Schedule.of(request.sampling, spec.noise),
            request.sampling.guidance,
            lambda step: noise(),
            index=index,
            generator=generator,
            request=request,
            held=held,
            context=context,
            uncond_context=uncond_context,
        )


@dataclass(frozen=True)
class Tables:
    """The rows' inputs for all steps, computed once: (steps, rows, ...) on the device."""

    timesteps: TimestepTable
    fps: Tensor
    tar: Tensor

    @staticmethod
    def of(rows: Sequence[BatchRow], denoiser: Denoiser, spec: Spec) -> "Tables":
        requests, device = [row.request for row in rows], rows[0].latents.device
        steps, levels = len(rows[0].schedule), spec.unet.levels
        each = np.stack([row.schedule.timesteps[::-1] for row in rows], axis=1)
        timesteps = torch.from_numpy(each if (each != each[:, :1]).any() else each[:, 0].copy()).to(device)
        fps = torch.tensor([request.sampling.fps_condition for request in requests], device=device)
        g = torch.stack([tar.tables(request.tar, levels, request.pass_frames, steps) for request in requests], dim=1)
        return Tables(denoiser.timestep_table(timesteps, fps), fps, g.to(device))


@dataclass
class Batch(SamplingLoop[BatchRow]):
    """Rows that share each call of the denoiser.

    `seconds` holds the time of each stage. `on_part` gets (windows done, all windows) of a step in windows.
    """

    denoiser: Denoiser
    spec: Spec
    dtype: torch.dtype
    rows: list[BatchRow]
    done: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"text": 0.0, "denoise": 0.0})
    cache: StepCache | None = None
    on_part: OnPart | None = None
    _tables: Tables | None = None
    _plans: dict[tuple[int, ...], tuple[list[tuple[tuple[int, ...], Conditioning]], Tensor]] = field(default_factory=dict)

    def drop(self, index: int) -> None:
        """Removes a video; the others are unaffected."""
        self.rows = [row for row in self.rows if row.index != index]
        self._tables = self._coefficients = None
        self._plans.clear()

    @undisturbed
    @torch.inference_mode()
    def step(self) -> None:
        """Advances every row by one step, with both guidance branches in one call unless a row asks for two."""
        start = time.perf_counter()
        self.walk()
        # overlaps with the GPU, which still computes the step
        for row in self.rows:
            row.draw(self.done)
        self.seconds["denoise"] += time.perf_counter() - start

    def advance(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        guided = tuple(i for i, row in enumerate(self.rows) if row.request.sampling.guided(self.done))
        if guided not in self._plans:
            self._plans[guided] = self._plan(guided)
        calls, plain = self._plans[guided]
        if self._tables is None:
            self._tables = Tables.of(self.rows, self.denoiser, self.spec)
        known, at = self._tables, self.done
        conditions = (known.timesteps.rows[at], known.fps, known.tar[at], self.coefficients())
        inputs = StepInputs(latents, *conditions, self.noise(latents), plain, self.history())
        whole, names = (
            self.rows[0].request.sampling.whole(at),
            [self._names(rows, conditioning) for rows, conditioning in calls],
        )
        made = tuple(
            NetworkCall(rows, conditioning, None if self.cache is None else self.cache.features(branches, whole))
            for (rows, conditioning), branches in zip(calls, names, strict=True)
        )
        seeds = tuple(row.request.seed for row in self.rows)
        # a recorded step would keep the callback, and what it holds, alive
        on_part = None if self.rows[0].request.plan is None else self.on_part
        step = SamplingStep(self.dtype, known.timesteps, made, inputs, at, seeds, on_part)
        latents, clean, *features = self.denoiser.run_step(step)
        if self.cache and whole:
            for branches, kept in zip(names, features, strict=True):
                self.cache.keep(branches, kept)
        return latents, clean

    def _plan(self, guided: tuple[int, ...]) -> tuple[list[tuple[tuple[int, ...], Conditioning]], Tensor]:
        """Returns each call's rows and contexts, and the place of each row's unconditional prediction."""
        every = tuple(range(len(self.rows)))
        cond, uncond = [row.context for row in self.rows], [self.rows[i].uncond_context for i in guided]
        if not all(row.request.sampling.batch_guidance for row in self.rows):
            calls = [(every, cond), (guided, uncond)]
        elif guided == every:  # the branches of every video share what comes before the first cross-attention
            calls = [(every, [*cond, *uncond])]
        else:
            calls = [((*every, *guided), [*cond, *uncond])]
        places = {row: len(every) + place for place, row in enumerate(guided)}
        plain = torch.tensor([places.get(i, i) for i in every], device=self.rows[0].latents.device)
        return [(rows, Conditioning(tuple(contexts))) for rows, contexts in calls if contexts], plain

    def _names(self, rows: tuple[int, ...], conditioning: Conditioning) -> list[Hashable]:
        """Returns the identity of each branch of a call: the video's index, and whether it is the conditional branch."""
        rows = rows * (len(conditioning.contexts) // len(rows))
        return [(self.rows[i].index, text is self.rows[i].context) for i, text in zip(rows, conditioning.contexts, strict=True)]
