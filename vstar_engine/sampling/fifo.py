"""FIFO: a queue of frames at rising noise levels, of which each iteration finishes one (arXiv 2405.11473).

The queue holds a frame for each sampling step, in partitions of a window each. An iteration takes every frame one step of its
own level further, moves the first frame out and a new one of pure noise in. Memory is that of one window at any length.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vstar_engine.config.windows import FIFO
from vstar_engine.kernels.guided_step import guided_step
from vstar_engine.machine.host_settings import undisturbed

from . import tar
from .batch import Batch, BatchRow
from .ddim import coefficients
from .schedule import Schedule
from .windows import rows_of


@dataclass
class FifoBatch(Batch):
    """One video made by a queue; `steps` counts those of its first window, then the queue's iterations.

    The queue starts from a window that is sampled as a clip of its own, noised again to the levels; its first frame stands in
    for those before the clip.
    """

    first: Batch | None = None
    queue: Tensor | None = None

    @staticmethod
    def of(batch: Batch) -> "FifoBatch":
        """Returns the batch of a queue for a fresh batch; ValueError for several videos or a built engine."""
        if len(batch.rows) > 1:
            raise ValueError(f"blend {FIFO} makes one video at a time, got {len(batch.rows)}")
        if batch.denoiser.module is None:
            raise ValueError(f"blend {FIFO} needs the network in eager PyTorch: each frame has a timestep of its own")
        (row,) = batch.rows
        assert row.request.plan is not None
        opening = range(row.request.plan.window)
        held: dict[str, Any] = {"index": row.index, "generator": row.generator, "request": row.request, "held": row.held}
        texts: dict[str, Any] = {
            "context": rows_of(row.context, opening),
            "uncond_context": rows_of(row.uncond_context, opening),
        }
        latents = row.latents[:, :, : len(opening)]
        noise = lambda step: torch.randn(latents.shape, generator=row.generator)  # noqa: E731 - one line, used once
        start = BatchRow(latents, row.schedule, row.guidance, noise, **held, **texts)
        common = (batch.denoiser, batch.spec, batch.dtype)
        return FifoBatch(*common, [row], seconds=batch.seconds, first=Batch(*common, [start]))

    @property
    def row(self) -> BatchRow:
        return self.rows[0]

    @property
    def schedule(self) -> Schedule:
        return self.row.schedule

    @property
    def lead(self) -> int:
        """Returns how many iterations finish frames before the clip begins."""
        assert self.row.request.plan is not None
        return len(self.schedule) - self.row.request.plan.window

    @property
    def steps(self) -> int:
        return len(self.schedule) + self.lead + self.row.request.frames

    @undisturbed
    @torch.inference_mode()
    def step(self) -> None:
        """Takes a step of the first window, or an iteration of the queue."""
        start = time.perf_counter()
        assert self.first is not None
        if self.first.done < self.first.steps:
            self.first.step()
        else:
            if self.queue is None:
                self.queue = self._filled(self.first.rows[0].latents)
            self._iterate(self.done - self.first.steps)
        self.done += 1
        self.seconds["denoise"] += time.perf_counter() - start

    def _noise(self, frames: int) -> Tensor:
        shape = (*self.row.latents.shape[:2], frames, *self.row.latents.shape[3:])
        return torch.randn(shape, generator=self.row.generator).to(self.row.latents)

    def _filled(self, clean: Tensor) -> Tensor:
        """Returns the queue of a clean window: each frame noised to the level of its place."""
        schedule, levels = self.schedule, len(self.schedule)
        frames = torch.arange(levels).sub(self.lead).clamp(min=0)
        signal = torch.from_numpy(schedule.alpha**0.5 * schedule.scale).to(clean)[:, None, None]
        spread = torch.from_numpy((1 - schedule.alpha) ** 0.5).to(clean)[:, None, None]
        return signal * clean[:, :, frames] + spread * self._noise(levels)

    def _iterate(self, iteration: int) -> None:
        """Takes every frame of the queue one step further and moves the first one out."""
        request, queue = self.row.request, self.queue
        assert queue is not None
        assert request.plan is not None
        length, noise = request.plan.window, self._noise(len(self.schedule))
        parts = [self._stepped(slice(at, at + length), queue, noise, iteration) for at in range(0, len(self.schedule), length)]
        stepped = torch.cat(parts, dim=2)
        if iteration >= self.lead:
            self.row.latents[:, :, iteration - self.lead] = stepped[:, :, 0]
            self.row.clean = self.row.latents
        self.queue = torch.cat([stepped[:, :, 1:], self._noise(1)], dim=2)

    def _stepped(self, places: slice, queue: Tensor, noise: Tensor, iteration: int) -> Tensor:
        """Returns a partition of the queue, (1, C, W, h, w), after a step of each frame's own level."""
        request, device = self.row.request, queue.device
        latents = queue[:, :, places]
        frames = torch.arange(places.start, places.stop) + iteration - self.lead
        timestep = torch.from_numpy(self.schedule.timesteps[places]).to(device)[None]
        contexts = [self._text(text, frames) for text in (self.row.context, self.row.uncond_context)]
        contexts = contexts if request.sampling.guidance != 1.0 else contexts[:1]
        fps = torch.tensor([request.sampling.fps_condition], device=device)
        network = self.denoiser
        context: Any = network.prepare_context(*contexts)
        eps = network(latents.to(self.dtype), timestep, context, fps, self._bias(places).to(device))
        numbers = coefficients(self.schedule, torch.tensor([request.sampling.guidance])).flip(0)[places, 0].to(latents)
        count = latents.shape[2]
        plain = torch.arange(count, device=device) + (count if len(contexts) > 1 else 0)
        # each frame is a video of one frame
        each = (x.transpose(1, 2).flatten(0, 1)[:, :, None] for x in (latents, eps, noise[:, :, places]))
        now, predicted, drawn = (x.contiguous() for x in each)
        return guided_step(now, predicted, plain, numbers, drawn)[0][:, :, 0].transpose(0, 1)[None]

    def _text(self, text: Any, frames: Tensor) -> Tensor:
        """Returns the text of frames that may lie before the clip or behind it, where its first and last are heard."""
        known = frames.clamp(0, self.row.request.frames - 1)
        begin, end = int(known.min()), int(known.max())
        rows = rows_of(text, range(begin, end + 1))
        return rows if rows.shape[1] == 1 and isinstance(text, Tensor) else rows[:, known.to(rows.device) - begin]

    def _bias(self, places: slice) -> Tensor:
        """Returns TAR for a partition, (1, levels, W, W): the rows of frames whose level is still regularised."""
        length, steps = places.stop - places.start, len(self.schedule)
        g = tar.table(self.row.request.tar, self.spec.unet.levels, length, 0)
        apart = (torch.arange(length)[:, None] - torch.arange(length)).abs()
        last = -1 if self.row.request.tar is None else self.row.request.tar.until_step
        active = steps - 1 - torch.arange(places.start, places.stop) <= last
        return g[:, :, apart] * active[:, None]
