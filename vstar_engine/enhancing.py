"""Enhances a video of any length: upscales it, adds noise and denoises it again in blended windows.

SDEdit (arXiv 2108.01073) with a text-to-video model, in windows with randomized blending (arXiv 2403.14773).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_engine.config.request import Request
from vstar_engine.config.streamed import StreamedRequest
from vstar_engine.machine import memory
from vstar_engine.machine.host_settings import undisturbed
from vstar_engine.networks.blended import BlendedDenoiser, window_starts
from vstar_engine.networks.vae import Vae
from vstar_engine.prompting.interpolation import spread
from vstar_engine.sampling.batch import Batch, BatchRow
from vstar_engine.sampling.schedule import Schedule
from vstar_engine.weights import checkpoint, key_map

from .engine import Engine, OnFrames
from .loading import open_weights
from .video import Video


@dataclass(frozen=True)
class Enhancement:
    """How a video is enhanced: windows of `window` frames that share `overlap`, and the share of steps that are taken."""

    window: int = 24
    overlap: int = 8
    strength: float = 0.6

    def __post_init__(self) -> None:
        window_starts(1, self.window, self.overlap)
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength is above 0 and at most 1, got {self.strength}")

    def steps(self, all_steps: int) -> int:
        """Returns how many of the steps are taken, the cleanest ones."""
        return max(1, round(self.strength * all_steps))


def cleanest(schedule: Schedule, steps: int) -> Schedule:
    """Returns the schedule of the last steps alone."""
    return Schedule(**{one.name: getattr(schedule, one.name)[:steps] for one in fields(Schedule)})


def upscaled(frames: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Frames (T, H, W, 3) uint8 -> (T, 3, h, w) in [-1, 1]: bicubic, filling the size; what is beyond it is cut off evenly."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    height, width = pixels.shape[-2:]
    factor = max(size[0] / height, size[1] / width)
    cover = max(size[0], round(factor * height)), max(size[1], round(factor * width))
    pixels = F.interpolate(pixels, cover, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (cover[0] - size[0]) // 2, (cover[1] - size[1]) // 2
    return pixels[:, :, top : top + size[0], left : left + size[1]]


@undisturbed
@torch.inference_mode()
def encoded(engine: Engine, frames: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Returns the scaled latents of upscaled frames, (1, C, T, h, w) float32, encoded one frame at a time."""
    with torch.device("meta"):
        vae = Vae(engine.spec.vae)
    tensors = open_weights(engine.spec, engine.path)
    checkpoint.load(vae, tensors, key_map.VAE, device=engine.device, dtype=engine.dtype)
    vae.eval().requires_grad_(False)
    latents = [vae.encode(upscaled(frame[None], size).to(engine.device, engine.dtype)).float() for frame in frames]
    return torch.cat(latents).transpose(0, 1)[None]


@undisturbed
@torch.inference_mode()
def enhance(
    engine: Engine,
    frames: np.ndarray,
    request: StreamedRequest,
    how: Enhancement,
    on_step: Callable[[int, int], None] | None = None,
    on_frames: OnFrames | None = None,
) -> Video:
    """Enhances frames (T, H, W, 3) uint8 as a request of T frames and the wanted size says.

    Raises ValueError for a size the model lacks or a model that makes videos in chunks, MemoryShortage where a window does
    not fit.
    """
    if engine.spec.streaming is not None:
        raise ValueError(f"model {engine.spec.name} makes a video in chunks; enhance with a text-to-video model")
    if request.sampling.walk:
        raise ValueError(f"videos are enhanced without {', '.join(request.sampling.walk)}")
    request = request.fitted(engine.spec)
    assert request.size is not None
    one = {each.name: getattr(request, each.name) for each in fields(Request)}
    plain = {"states": ("",), "at": (), "durations": (), "negatives": (), "negative": ""}
    window = Request(**{**one, **plain, "frames": min(how.window, len(frames))})
    memory.make_room(memory.Footprint.of(window, engine.spec, engine.dtype), engine.denoiser, engine.device)
    anchors, negative = engine.encoded(request, None)
    context, uncond = (
        texts[None] if len(texts) == 1 else spread(texts.float(), request.frames, request.mode, request.anchors)[None]
        for texts in (anchors, negative)
    )
    schedule = cleanest(Schedule.of(request.sampling), how.steps(request.sampling.steps))
    clean = encoded(engine, frames, request.size)
    generator = torch.Generator().manual_seed(request.seed)

    def noise(index: int = 0) -> Tensor:
        return torch.randn(clean.shape, generator=generator).to(engine.device)

    alpha = float(schedule.alpha[-1])
    latents = alpha**0.5 * float(schedule.scale[-1]) * clean + (1 - alpha) ** 0.5 * noise()
    row = BatchRow(
        latents,
        schedule,
        request.sampling.guidance,
        noise,
        index=0,
        request=request,
        held=None,
        context=context.to(engine.dtype),
        uncond_context=uncond.to(engine.dtype),
    )
    blended = BlendedDenoiser(engine.denoiser, how.window, how.overlap, random.Random(request.seed))
    batch = Batch(blended, engine.spec, engine.dtype, [row])
    while batch.done < batch.steps:
        batch.step()
        if on_step:
            on_step(batch.done, batch.steps)
    about = {"enhanced": {"window": how.window, "overlap": how.overlap, "strength": how.strength}}

    def told(part: Video) -> None:
        if on_frames:
            on_frames(replace(part, provenance={**part.provenance, **about}))

    made = engine.finish(batch, row, told)
    return replace(made, provenance={**made.provenance, **about})
