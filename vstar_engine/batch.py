"""Videos of the same frames, size and steps on their way through one denoiser, each with settings of its own."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from . import tar
from .backends import Denoiser
from .config import Request, Spec
from .embeddings import Embeddings
from .sampling import advance
from .schedule import Schedule
from .step_cache import StepCache
from .unet import UNet


@dataclass(eq=False)
class Row:
    """One video of a batch: what it hears, where its noise comes from, and how far it has come.

    `index` is its place among the requests and `held` the embeddings it brought; context and unconditional are
    (1, 1 or T, 77, C), latents and clean (what the last step took for the finished latents) (1, 4, T, h, w).
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

    @staticmethod
    def of(index: int, request: Request, held: Embeddings | None, context: Tensor, unconditional: Tensor, spec: Spec) -> "Row":
        """Draws the first noise of a request whose size is filled in; on the CPU, so that a seed is the same everywhere."""
        assert request.size is not None
        generator = torch.Generator().manual_seed(request.seed)
        cells = (side // spec.vae.factor for side in request.size)
        latents = torch.randn(1, spec.unet.in_channels, request.frames, *cells, generator=generator)
        schedule = Schedule.of(request.sampling)
        return Row(index, request, held, context, unconditional, schedule, generator, latents.to(context.device))

    def noise(self) -> Tensor:
        return torch.randn(self.latents.shape, generator=self.generator)

    def advance(self, done: int, conditional: Tensor, unconditional: Tensor | None) -> None:
        """Takes the latents one step further."""
        i, guidance = len(self.schedule) - 1 - done, self.request.sampling.guidance
        self.latents, self.clean = advance(self.schedule, i, self.latents, conditional, unconditional, guidance, self.noise)


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
    _heard: dict[tuple[int, ...], Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.rows[0].schedule)

    def drop(self, index: int) -> None:
        """Takes a video out; the others go on as they would have."""
        self.rows = [row for row in self.rows if row.index != index]
        self._heard.clear()

    @torch.inference_mode()
    def step(self) -> None:
        """Takes every row one step further: guidance branches in one call, or in two where a row asks for that."""
        start = time.perf_counter()
        guided = [row for row in self.rows if row.request.sampling.guided(self.done)]
        heard, unheard = [row.context for row in self.rows], [row.unconditional for row in guided]
        if not all(row.request.sampling.batch_guidance for row in self.rows):
            eps = torch.cat([self._predict(*call) for call in ((self.rows, heard), (guided, unheard)) if call[0]])
        elif len(guided) in (0, len(self.rows)):  # both branches of every video: what they share is computed once
            eps = self._predict(self.rows, [*heard, *unheard])
        else:
            eps = self._predict([*self.rows, *guided], [*heard, *unheard])
        conditional, plain = eps[: len(heard)], iter(eps[len(heard) :])
        for row, e in zip(self.rows, conditional, strict=True):
            row.advance(self.done, e[None], next(plain)[None] if row in guided else None)
        self.done += 1
        self.seconds["denoise"] += time.perf_counter() - start

    def _predict(self, rows: Sequence[Row], heard: Sequence[Tensor]) -> Tensor:
        """Gives the noise of rows that hear one context each, or two, all rows the first: (contexts, 4, T, h, w) float32."""
        latents = torch.cat([row.latents for row in rows]).to(self.dtype)
        device, first = latents.device, rows[0]
        at = int(first.schedule.timesteps[self.steps - 1 - self.done])
        timestep = torch.full((len(rows), 1), at, device=device)
        fps = torch.tensor([row.request.sampling.fps_condition for row in rows], device=device)
        levels = self.spec.unet.levels
        g = torch.cat([tar.table(row.request.tar, levels, row.request.frames, self.done) for row in rows])
        inputs = (latents, timestep, self._context(heard), fps, g.to(device))
        if self.cache is None:
            return self.denoiser(*inputs).float()
        branches = [(row.index, text is row.context) for row, text in zip(cycle(rows), heard)]
        return self.cache(branches, first.request.sampling.whole(self.done), *inputs).float()

    def _context(self, heard: Sequence[Tensor]) -> Any:
        """Gives texts as the denoiser takes them, made once for as long as the same are heard."""
        key = tuple(map(id, heard))
        if key not in self._heard:
            frames = max(context.shape[1] for context in heard)
            context = torch.cat([context.expand(1, frames, -1, -1) for context in heard])
            self._heard[key] = self.denoiser.hear(context) if isinstance(self.denoiser, UNet) else context
        return self._heard[key]
