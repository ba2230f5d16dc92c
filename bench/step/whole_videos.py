"""Whole videos of a model that comes with its weights: as published, by clean PyTorch, by the engine, and with a lossy option.

All start from the same noise and draw the same noise in every step, so their frames can be compared. The published path and the
clean one run the engine's weights through the ladder's baselines; text, guidance, the sampler's update and the mp4 are shared.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from vstar_engine.bench.harness.contest import NotHere, Pace, observed
from vstar_engine.bench.harness.random_networks import lay_out
from vstar_engine.bench.harness.rows import ResultFile, ResultRow
from vstar_engine.bench.harness.timing import interleave
from vstar_engine.bench.ops.pytorch_layers import map_pages, unfused
from vstar_engine.config.request import Request
from vstar_engine.config.sampling import STEP_CACHE, Sampling
from vstar_engine.engine import Engine
from vstar_engine.machine import malloc
from vstar_engine.networks.layers import Norm
from vstar_engine.networks.unet import UNet
from vstar_engine.networks.vae import CHUNK, Vae
from vstar_engine.sampling.ddim import sample
from vstar_engine.video import Video, to_bytes
from vstar_engine.weights import bundled

from .fast_modes import GUIDANCE, STATES
from .ladder import BASELINE, BATCHED, DTYPE, LAST, Step
from .workload import TAR, Workload, trained_unet

PUBLISHED, CLEAN, OURS, LOSSY = PATHS = ("published", "clean eager", "ours", f"ours, --fast {STEP_CACHE}")
FEATURES = {PUBLISHED: frozenset[str](), CLEAN: BASELINE}


@dataclass
class Route:
    """One way to the video: `make` samples and decodes it; `frames` is its last result, `steps` the seconds of each step."""

    make: Callable[[], Video]
    folder: Path
    frames: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    steps: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        """Makes the video and writes its mp4."""
        video = self.make()
        video.save(self.folder / "video.mp4")
        self.frames = video.frames
        self.steps.append(video.seconds["denoise"])


class Baseline:
    """A set of the ladder's improvements as a whole pipeline around the engine's weights, text tower and noise."""

    def __init__(self, engine: Engine, workload: Workload, features: frozenset[str], request: Request):
        self.engine, self.workload, self.features, self.request = engine, workload, features, request
        self.dtype = workload.dtype if DTYPE in features else torch.float32
        layout = "channels_last" if LAST in features else "contiguous"
        workload.base[self.dtype, layout] = lay_out(trained_unet(workload.spec, workload.device, self.dtype), layout)
        step = Step(workload)
        self.regularised, self.plain = (step.network(features, regularised) for regularised in (True, False))
        vae = Vae(workload.spec.vae, encoder=False).to(workload.device, self.dtype).eval().requires_grad_(False)
        vae.load_state_dict(engine.vae.state_dict())
        self.vae = unfused(lay_out(vae, layout), Norm)

    @torch.inference_mode()
    def __call__(self) -> Video:
        """Makes the video; its noise is the engine's for the request's seed."""
        if self.workload.device.type == "cpu":
            map_pages()
        (row,) = self.engine.begin([self.request]).rows
        context, uncond = row.context, row.uncond_context
        assert isinstance(context, Tensor)
        assert isinstance(uncond, Tensor)
        texts = [context, uncond.expand_as(context)]
        fps = torch.full((1,), self.request.sampling.fps_condition, device=self.workload.device)
        no_bias = torch.zeros(1, self.workload.spec.unet.levels, self.workload.frames, device=self.workload.device)

        def denoise(latents: Tensor, timestep: Tensor, index: int) -> tuple[Tensor, Tensor]:
            unet: UNet = self.regularised if index <= TAR.until_step else self.plain
            x, step_time = latents.to(self.dtype), timestep[:, None]
            if BATCHED in self.features:
                both = unet(
                    x.repeat(2, 1, 1, 1, 1), step_time.repeat(2, 1), torch.cat(texts).to(self.dtype), fps.repeat(2), no_bias
                )
                cond, uncond = both.float().chunk(2)
            else:
                cond, uncond = (unet(x, step_time, text.to(self.dtype), fps, no_bias).float() for text in texts)
            return cond, uncond

        start = time.perf_counter()
        *_, (_, _, latents, _) = sample(denoise, row.schedule, row.latents, guidance=GUIDANCE, noise=row.noise)
        denoised = time.perf_counter() - start
        pixels = torch.cat(list(self.vae.decoded(latents.to(self.dtype), CHUNK)))
        return Video(to_bytes(pixels.transpose(0, 1)), self.request.fps, {}, {"denoise": denoised})


def likeness(frames: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Says how a video's bytes differ from another's: the share that differs, the largest difference, and the PSNR in dB."""
    apart = np.abs(frames.astype(np.int16) - wanted.astype(np.int16))
    noise = float(np.mean(apart.astype(np.float64) ** 2))
    psnr = {"psnr": 10 * float(np.log10(255**2 / noise))} if noise else {}
    return {"differing": float(np.mean(apart > 0)), "largest": int(apart.max()), **psnr}


def measure(workload: Workload, steps: int, rows: ResultFile, pace: Pace) -> None:
    """Makes the video by every path in turn and writes a row for each."""
    if workload.model not in bundled.BUNDLED:
        raise NotHere(f"whole videos take a model that comes with its weights, one of {', '.join(bundled.BUNDLED)}")
    engine = Engine.load(workload.model, device=str(workload.device), dtype=str(workload.dtype)[6:])
    exact = Sampling(steps, guidance=GUIDANCE)
    height, width = workload.size
    request = Request(STATES, workload.frames, 0, (height, width), exact, TAR)
    lossy = replace(request, sampling=replace(exact, fast=(STEP_CACHE,)))

    def ours(wanted: Request) -> Callable[[], Video]:
        def make() -> Video:
            if workload.device.type == "cpu":
                malloc.keep_pages()
            return engine.run(wanted)

        return make

    makers: dict[str, Callable[[], Video]] = {
        **{name: Baseline(engine, workload, features, request) for name, features in FEATURES.items()},
        OURS: ours(request),
        LOSSY: ours(lossy),
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Route(make, Path(folder)) for name, make in makers.items()}
        peaks = {name: observed(path, workload.device)[1] for name, path in paths.items()}
        for path in paths.values():
            path.steps.clear()
        busy = os.getloadavg()[0]
        timings = interleave(paths, pace.rounds, pace.warmup, min(pace.limit, max(pace.left, 0.0)))
    case = {"part": "videos", **workload.case, "steps": steps, "guidance": GUIDANCE, "weights": "trained"}
    for name, path in paths.items():
        numbers = {
            **asdict(timings[name]),
            "step": median(path.steps[pace.warmup :]) / steps,
            "peak_bytes": peaks[name],
            "load": [round(busy, 2), round(os.getloadavg()[0], 2)],
            **likeness(path.frames, paths[PUBLISHED].frames),
        }
        rows.write(ResultRow("pipeline", case, name, str(workload.dtype)[6:], str(workload.device), numbers=numbers))
