"""The engine: owns the text tower, the denoiser and the autoencoder, and takes states to a video."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from . import __version__, bundled, checkpoint, memory
from . import tar as tar_rows
from .backends import Denoiser, load_backend
from .config import Request, Sampling, Spec, Tar, model_named
from .device import device_named, dtype_named
from .errors import CheckpointError
from .sampling import Denoise, sample
from .schedule import Schedule
from .text import TextTower, spread, tokenize
from .vae import Vae
from .video import Video, to_bytes

log = logging.getLogger(__name__)

DEFAULT_SAMPLING, DEFAULT_TAR = Sampling(), Tar()


class Engine:
    """A loaded model; make one with `Engine.load`, then call `generate` as often as you like."""

    def __init__(
        self,
        spec: Spec,
        text: TextTower,
        denoiser: Denoiser,
        vae: Vae,
        device: torch.device,
        dtype: torch.dtype,
        weights: str,
        unused: list[str],
    ):
        self.spec, self.text, self.denoiser, self.vae = spec, text, denoiser, vae
        self.device, self.dtype, self.weights, self.unused = device, dtype, weights, unused

    @staticmethod
    def load(
        model: str = "videocrafter2",
        weights: str | Path | None = None,
        backend: str = "eager",
        device: str = "cpu",
        dtype: str = "float32",
        spatial_attention: str = "sdpa",
    ) -> "Engine":
        """Loads a model from a folder made by `vstar-engine convert`; `mini` needs none.

        Raises ValueError for an unknown name, CheckpointError for bad weights, DeviceError for a device or dtype that cannot
        compute here, MissingLibrary where an optional library is asked for and absent.
        """
        spec, load_denoiser = model_named(model), load_backend(backend)
        kind = dtype_named(dtype)
        where = device_named(device, kind)
        tensors = checkpoint.Weights(weights or bundled.weights(spec))
        made_for = tensors.manifest.get("model", model)
        if made_for != model:
            raise CheckpointError(f"the weights in {tensors.path} are for model {made_for}, not {model}")
        with torch.device("meta"):
            text, vae = TextTower(spec.text), Vae(spec.vae, encoder=False)
        unused = checkpoint.load(text, tensors, checkpoint.TEXT, device=where, dtype=kind)
        unused += checkpoint.load(vae, tensors, checkpoint.VAE, device=where, dtype=kind)
        denoiser = load_denoiser(spec, tensors, device=where, dtype=kind, spatial_attention=spatial_attention)
        unused += [name for name in tensors if not name.startswith((checkpoint.UNET, checkpoint.VAE, checkpoint.TEXT))]
        log.info("%s: %d tensors used, %d not needed", model, len(tensors) - len(unused), len(unused))
        log.debug("not needed: %s", ", ".join(unused))
        source = tensors.manifest.get("source", {}).get("sha256", tensors.path.name)
        return Engine(
            spec, text.eval().requires_grad_(False), denoiser, vae.eval().requires_grad_(False), where, kind, source, unused
        )

    def generate(
        self,
        states: str | Sequence[str],
        frames: int = 64,
        seed: int = 0,
        *,
        sampling: Sampling = DEFAULT_SAMPLING,
        tar: Tar | None = DEFAULT_TAR,
        size: tuple[int, int] | None = None,
        negative: str = "",
        mode: str = "linear",
        fps: float = 8.0,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Video:
        """Makes one video that passes through `states` in order; a lone string is one state. See `run`."""
        given = (states,) if isinstance(states, str) else tuple(states)
        return self.run(Request(given, frames, seed, size, sampling, tar, negative, mode, fps), on_step)

    @torch.inference_mode()
    def run(self, request: Request, on_step: Callable[[int, int], None] | None = None) -> Video:
        """Makes the video of a request; `on_step` hears (steps done, steps in all).

        A seed draws the same noise on every device and backend. Raises ValueError for a size or TAR level the model lacks,
        MemoryShortage before starting when it would not fit.
        """
        request = request.fitted(self.spec)
        memory.check(memory.Footprint.of(request, self.spec, self.dtype), self.device, loaded=True)
        seconds: dict[str, float] = {}
        with _timed(seconds, "text"):
            anchors = self.embed(request.states)
            context = spread(anchors.float(), request.frames, request.mode)[None].to(self.dtype)
            unconditional = self.embed([request.negative])[None]
        with _timed(seconds, "denoise"):
            latents = self._denoise(request, self.guided(request, context, unconditional), on_step)
        with _timed(seconds, "decode"):
            frames = to_bytes(self.vae.decode(latents.to(self.dtype))[0])
        return Video(frames, request.fps, self._provenance(request), seconds)

    @torch.inference_mode()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Encodes prompts: (n, 77, C) in the engine's dtype, on its device."""
        return self.text(tokenize(prompts).to(self.device))

    def guided(self, request: Request, context: Tensor, unconditional: Tensor) -> Denoise:
        """Makes the function that `sample` calls: two branches in one batch or in two passes, one where guidance is 1.

        context (1, 1 or T, 77, C), unconditional (1, 1, 77, C).
        """
        settings, levels = request.sampling, self.spec.unet.levels

        def predict(latents: Tensor, timestep: Tensor, context: Tensor, index: int) -> Tensor:
            fps = torch.full((len(latents),), settings.fps_condition, device=self.device)
            rows = tar_rows.table(request.tar, levels, request.frames, index).to(self.device)
            return self.denoiser(latents.to(self.dtype), timestep[:, None], context, fps, rows).float()

        def denoise(latents: Tensor, timestep: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
            if settings.guidance == 1.0:
                return predict(latents, timestep, context, index), None
            if not settings.batch_guidance:
                return predict(latents, timestep, context, index), predict(latents, timestep, unconditional, index)
            both = torch.cat([context, unconditional.expand_as(context)])
            conditional, plain = predict(latents.repeat(2, 1, 1, 1, 1), timestep.repeat(2), both, index).chunk(2)
            return conditional, plain

        return denoise

    def _denoise(self, request: Request, denoise: Denoise, on_step: Callable[[int, int], None] | None) -> Tensor:
        assert request.size is not None
        generator = torch.Generator().manual_seed(request.seed)
        cells = (side // self.spec.vae.factor for side in request.size)
        shape = (1, self.spec.unet.in_channels, request.frames, *cells)
        latents = torch.randn(shape, generator=generator).to(self.device)
        settings = request.sampling
        schedule = Schedule.ddim(settings.steps, eta=settings.eta)

        def noise(index: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        steps = sample(denoise, schedule, latents, guidance=settings.guidance, noise=noise)
        for index, _, now, _ in steps:
            latents = now
            if on_step:
                on_step(index + 1, settings.steps)
        return latents

    def _provenance(self, request: Request) -> dict[str, object]:
        made = {"engine": "vstar-engine", "version": __version__, "model": self.spec.name, "weights": self.weights}
        run = {"device": str(self.device), "dtype": str(self.dtype)[6:], "torch": torch.__version__}
        return {**made, "request": asdict(request), **run}


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
