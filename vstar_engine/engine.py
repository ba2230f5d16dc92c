"""The engine: runs the text tower, the denoiser and the VAE to turn states into a video."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.artifacts.files import digest_of
from vstar_engine.config import request_warnings
from vstar_engine.config.request import Clip, Request, rows_at_once
from vstar_engine.config.sampling import FP8, STEP_CACHE, Sampling, Tar
from vstar_engine.config.timeline import Position
from vstar_engine.config.windows import FIFO
from vstar_engine.machine import malloc, memory
from vstar_engine.machine.host_settings import undisturbed
from vstar_engine.networks.step import OnPart
from vstar_engine.prompting.embeddings import Embeddings, Encode
from vstar_engine.prompting.interpolation import FrameTexts, spread
from vstar_engine.prompting.tokenizer import tokenize
from vstar_engine.sampling.batch import Batch, BatchRow
from vstar_engine.sampling.fifo import FifoBatch
from vstar_engine.sampling.saved_state import Checkpoint
from vstar_engine.sampling.step_cache import StepCache
from vstar_engine.sampling.windows import in_windows
from vstar_engine.weights import checkpoint, key_map
from vstar_engine.weights.lora import MergedWeights

from .errors import CheckpointError
from .loading import LoadedModel, check_machine, load_model, open_weights
from .model_choice import ModelChoice
from .version import __version__
from .video import Video, to_bytes
from .warmup import ClipSize, usual_clips, warm_up

log = logging.getLogger(__name__)
DEFAULT_SAMPLING, DEFAULT_TAR = Sampling(), Tar()
OnFrames = Callable[[Video], None]


class Engine:
    """A loaded model. Make one with `Engine.load`, then call `generate` for each video."""

    def __init__(self, loaded: LoadedModel):
        self.spec, self.text, self.denoiser, self.vae = loaded.spec, loaded.text, loaded.denoiser, loaded.vae
        self.device, self.dtype, self.artifact = loaded.device, loaded.dtype, loaded.artifact
        self.weights, self.path, self.unused = loaded.weights, loaded.path, loaded.unused
        self.text_hash, self.vocabulary = loaded.text_hash, loaded.vocabulary
        self.loras, self.fp8, self.origin = tuple(loaded.loras), loaded.fp8, loaded.origin
        self.image = loaded.image

    @staticmethod
    @undisturbed
    def load(
        model: str | None = None,
        weights: str | Path | None = None,
        backend: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        spatial_attention: str = "auto",
        text: str | None = "weights",
        engine: str | Path | BuiltEngine | None = None,
        loras: Sequence[str] = (),
        graphs: bool = True,
        fp8: bool = False,
        warm: bool | Sequence[ClipSize] = False,
    ) -> "Engine":
        """Loads a model.

        `weights` is a folder made by `vstar-engine convert`, a checkpoint file, a diffusers folder, or an id of the Hub,
        `owner/name[@revision][:file]`, which is downloaded without a question. Without them `mini` has its own, and another
        model those that were pulled.
        `engine` is a folder made by `vstar-engine build`. Its back end runs the UNet, and it sets model, weights, device and
        dtype. Without it these default to videocrafter2 in eager PyTorch, in float32 on the CPU.
        `device` is "cpu", "cuda" or "cuda:N", `dtype` "float32", "float16" or "bfloat16". `text` is "weights", or None to load
        no text tower and make videos from `Embeddings`.
        `loras` are FILE or FILE:STRENGTH and are merged into the UNet; a built engine contains its own.
        `graphs` replays the steps of `eager` and TensorRT as CUDA graphs on a GPU, one for each shape.
        `fp8` runs layers in FP8, calibrated on a short clip while loading.
        `warm` runs clips of these sizes, (frames, height, width) in pixels, through all stages; True runs those of `clips`. No
        request then waits for kernels to be loaded, tuned and recorded. Raises ValueError for an unknown name, CheckpointError
        for bad weights, DownloadError for those that cannot be downloaded, OutputError for a disk that is too small to convert
        them, EngineError for an engine that is damaged or was built for something else, DeviceError for a device or dtype that
        cannot compute here, MissingLibrary for an optional library that is not installed.
        """
        choice = ModelChoice.of(
            engine,
            model=model,
            weights=weights,
            backend=backend,
            device=device,
            dtype=dtype,
            spatial_attention=spatial_attention,
            text=text,
            loras=tuple(loras),
            graphs=graphs,
            fp8=fp8,
        )
        made = Engine(load_model(choice, *check_machine(choice)))
        if warm:
            made.warm(() if warm is True else warm)
        return made

    @property
    def records(self) -> bool:
        """Returns whether the first steps of a shape take longer, because they are recorded or tuned."""
        return self.denoiser.records_steps or (self.artifact is not None and self.device.type == "cuda")

    def clips(self) -> list[ClipSize]:
        """Returns the default sizes to warm, (frames, height, width) in pixels: a built engine's own, else usual ones."""
        return usual_clips(self.spec, self.device, self.artifact)

    def warm(self, clips: Sequence[ClipSize] = (), sampling: Sampling = DEFAULT_SAMPLING) -> None:
        """Runs clips of some sizes, by default those of `clips`, through all stages, with as few steps as cover `sampling`.

        Another batch size, `fast`, `batch_guidance` or guidance 1 takes other steps, which stay cold. Raises as `run` does.
        """
        warm_up(self, clips or self.clips(), sampling)

    @undisturbed
    def adapt(self, loras: Sequence[str] = ()) -> None:
        """Replaces the LoRAs (FILE or FILE:STRENGTH) merged into the UNet; none restores the weights, bit for bit.

        Raises CheckpointError for a file that does not fit and leaves the UNet as it was; ValueError for a built engine.
        """
        if self.fp8 is not None:
            raise ValueError(f"a network in {FP8} keeps the LoRAs it was loaded with; load another with `loras`")
        unet = self.denoiser.module
        if self.artifact is not None or unet is None:
            raise ValueError("a built engine keeps the LoRAs it was built with; build another with `vstar-engine build --lora`")
        before = [str(lora) for lora in self.loras]
        try:
            self._refill(unet, loras)
        except CheckpointError:
            self._refill(unet, before)
            raise

    def _refill(self, unet: nn.Module, loras: Sequence[str]) -> None:
        """Reloads the UNet's weights with LoRAs merged in."""
        self.denoiser.forget_graphs()
        tensors = open_weights(self.spec, self.path, loras)
        checkpoint.load(unet, tensors, key_map.UNET, device=self.device, dtype=self.dtype)
        self.loras = tensors.loras if isinstance(tensors, MergedWeights) else ()

    def generate(
        self,
        states: str | Sequence[str] | Embeddings,
        frames: int = 64,
        seed: int = 0,
        *,
        sampling: Sampling | None = None,
        tar: Tar | None = DEFAULT_TAR,
        size: tuple[int, int] | None = None,
        negative: str = "",
        mode: str = "linear",
        fps: float = 8.0,
        at: Sequence[Position] = (),
        durations: Sequence[float] = (),
        negatives: Sequence[str] = (),
        window: int | None = None,
        overlap: int = Clip.overlap,
        blend: str = Clip.blend,
        phase: bool = False,
        noise: str = Clip.noise,
        noise_share: float = Clip.noise_share,
        guide: str = "",
        on_step: Callable[[int, int], None] | None = None,
    ) -> Video:
        """Makes one video that passes through `states` in order; a lone string is one state.

        `sampling` and `size`, (height, width) in pixels, default to the model's own. Other settings are those of
        `config.request.Clip`. `Embeddings` contain states, places and negatives; `at` or `durations` override their places.
        `on_step` is called with (steps done, all steps).
        Returns a `Video` of (frames, height, width, 3) uint8. Raises ValueError for a setting out of range, and as `run` does.
        """
        embeddings = None
        if isinstance(states, Embeddings):
            embeddings, given = states, states.synopsis.states
            if negative or negatives:
                raise ValueError("embeddings bring their negative prompt with them; give none")
            negative, negatives = states.negative_prompt, states.synopsis.negatives
            if not at and not durations:
                at, durations = states.synopsis.at, states.synopsis.durations
        else:
            given = (states,) if isinstance(states, str) else tuple(states)
        places = (tuple(at), tuple(durations), tuple(negatives))
        rest: tuple[Any, ...] = (*places, window, overlap, blend, phase, noise, noise_share, guide)
        sampling = sampling or Sampling.usual(own=self.spec.defaults)
        request = Request(given, frames, seed, size, sampling, tar, negative, mode, fps, *rest)
        return self.run(request, on_step, embeddings)

    def run(
        self,
        request: Request,
        on_step: Callable[[int, int], None] | None = None,
        embeddings: Embeddings | None = None,
        on_frames: OnFrames | None = None,
        checkpoint: Checkpoint | None = None,
        on_window: OnPart | None = None,
    ) -> Video:
        """Makes the video of a request: (T, H, W, 3) uint8 frames.

        `on_step` is called with (steps done, all steps), `on_window` with (windows done, all windows) of each step, `on_frames`
        with runs of decoded frames. `embeddings` of the request's states and negatives replace the text tower. A seed draws the
        same noise on every device and back end. `checkpoint` is written meanwhile. Raises ValueError for a size or TAR level
        that the model lacks, CheckpointError for embeddings of another text tower, MemoryShortage before the first step,
        EngineError for a clip that a built engine was not built for, NotFinite for a video that came out as NaN.
        """
        (video,) = self.run_batch([request], on_step, None, [embeddings], on_frames, checkpoint, on_window)
        assert video is not None
        return video

    def run_batch(
        self,
        requests: Sequence[Request],
        on_step: Callable[[int, int], None] | None = None,
        cancelled: Callable[[int], bool] | None = None,
        embeddings: Sequence[Embeddings | None] = (),
        on_frames: OnFrames | None = None,
        checkpoint: Checkpoint | None = None,
        on_window: OnPart | None = None,
    ) -> list[Video | None]:
        """Makes the videos of requests in one batch; they share frames, size and steps, and differ in anything else.

        A video does not depend on the others of its batch, but for rounding. `cancelled(index)` is called before every step; a
        cancelled request has None for its video. `on_frames` is called with runs of decoded frames, each a `Video` with its own
        provenance, one video after another. `checkpoint` is for a batch of one. Raises as `run` does.
        """
        batch = self.begin(requests, embeddings)
        batch.on_part = on_window
        if checkpoint is not None:
            checkpoint.begin(batch, self.identity)
        while batch.rows and batch.done < batch.steps:
            for index in [row.index for row in batch.rows if cancelled and cancelled(row.index)]:
                batch.drop(index)
            if batch.rows:
                batch.step()
                if checkpoint is not None:
                    checkpoint.keep(batch, self.identity)
                if on_step:
                    on_step(batch.done, batch.steps)
        videos: list[Video | None] = [None] * len(requests)
        for row in batch.rows:
            videos[row.index] = self.finish(batch, row, on_frames)
        return videos

    @undisturbed
    @torch.inference_mode()
    def begin(
        self, requests: Sequence[Request], embeddings: Sequence[Embeddings | None] = (), encode: Encode | None = None
    ) -> Batch:
        """Prepares a batch of requests that share frames, size and steps. Call `Batch.step` for each step, then `finish`.

        `encode` replaces `embed`. Raises as `run` does.
        """
        if not requests:
            raise ValueError("there is no request in the batch; give at least one")
        if self.spec.streaming is not None:
            raise ValueError(f"model {self.spec.name} makes a video in chunks from a first one: use `streaming.Stream`")
        requests = [self._fitted(request) for request in requests]
        first = requests[0]
        shapes = sorted({(r.frames, r.size, r.sampling.steps, *r.sampling.walk, repr(r.plan)) for r in requests})
        if len(shapes) > 1:
            raise ValueError(f"the videos of a batch share frames, size and steps, got {', '.join(map(str, shapes))}")
        if self.artifact is not None:
            self.artifact.check_requests(*requests)
        footprint = memory.Footprint.of(first, self.spec, self.dtype)
        memory.make_room(replace(footprint, batch=rows_at_once(requests)), self.denoiser, self.device)
        seconds = {"text": 0.0, "denoise": 0.0}
        with _timed(seconds, "text"):
            given = [*embeddings] or [None] * len(requests)
            rows = [
                BatchRow.of(i, request, held, *self._context(request, held, encode or self.embed), self.spec)
                for i, (request, held) in enumerate(zip(requests, given, strict=True))
            ]
        # whichever of them are guided, their steps differ in the number of these alone, and fewer kinds are recorded
        rows.sort(key=lambda row: row.request.sampling.guidance == 1.0)
        cache = StepCache(self.spec.unet) if STEP_CACHE in first.sampling.fast else None
        denoiser = self.denoiser
        if first.plan is not None and first.blend == FIFO:
            return FifoBatch.of(Batch(denoiser, self.spec, self.dtype, rows, seconds=seconds))
        if first.plan is not None:
            wide = 1 if self.artifact is not None else memory.windows_at_once(footprint, denoiser, self.device)
            denoiser = in_windows(denoiser, first.plan, wide)
        return Batch(denoiser, self.spec, self.dtype, rows, seconds=seconds, cache=cache)

    @undisturbed
    @torch.inference_mode()
    def finish(self, batch: Batch, row: BatchRow, on_frames: OnFrames | None = None) -> Video:
        """Decodes a row whose steps are done, as many frames at once as fit in memory: (T, H, W, 3) uint8.

        `on_frames` is called with each run of frames as a video. Raises NotFinite for NaN.
        """
        seconds, request, done = dict(batch.seconds), row.request, 0
        assert request.size is not None
        frames = np.empty((request.frames, *request.size, 3), np.uint8)
        whole = Video(frames, request.fps, self.provenance(request, row.held), seconds)
        with _timed(seconds, "decode"):
            chunk = memory.frames_at_once(self.spec, *request.size, self.dtype, self.denoiser, self.device)
            for pixels in self.vae.decoded(row.latents.to(self.dtype), chunk):
                part = frames[done : done + len(pixels)]
                part[:] = to_bytes(pixels.transpose(0, 1))
                done += len(part)
                if on_frames:
                    on_frames(replace(whole, frames=part))
        if self.device.type == "cpu":
            malloc.give_back()
        return whole

    def _fitted(self, request: Request) -> Request:
        """Returns a request with its size filled in, and warns of what the model was not trained for."""
        if self.artifact is not None and request.size is None and self.artifact.identity["size"]:
            request = replace(request, size=tuple(self.artifact.identity["size"]))
        request = request.fitted(self.spec)
        request_warnings.warn_placed(request)
        request_warnings.warn_untrained(request, self.spec, self.vocabulary, bool(self.loras))
        return request

    def _context(
        self, request: Request, embeddings: Embeddings | None, encode: Encode
    ) -> tuple[Tensor | FrameTexts, Tensor | FrameTexts]:
        """Returns the text embeddings of the frames, (1, T, 77, C), and the negative ones, (1, 1 or T, 77, C).

        For a clip in windows, what those of a window are made of.
        """
        anchors, negative = self.encoded(request, embeddings, encode)
        where = request.anchors
        if request.pass_frames < request.frames:
            texts = FrameTexts(anchors, tuple(where), request.mode, self.dtype)
            return texts, negative[None] if len(negative) == 1 else replace(texts, anchors=negative)
        context = spread(anchors.float(), request.frames, request.mode, where)[None].to(self.dtype)
        if len(negative) == 1:
            return context, negative[None]
        return context, spread(negative.float(), request.frames, request.mode, where)[None].to(self.dtype)

    @undisturbed
    @torch.inference_mode()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Encodes prompts: (n, 77, C) in the engine's dtype, on its device.

        77 tokens are CLIP's context; longer prompts are cut. Raises ValueError without a text tower.
        """
        if self.text is None:
            raise ValueError("this engine was loaded without its text tower; give embeddings (`vstar-engine embed`)")
        return self.text(tokenize(prompts, self.spec.text).to(self.device))

    def encoded(self, request: Request, embeddings: Embeddings | None, encode: Encode | None = None) -> tuple[Tensor, Tensor]:
        """Returns the embeddings of the states, (K, 77, C), and of the negative prompts, (1 or K, 77, C)."""
        encode = encode or self.embed
        if embeddings is None:
            return encode(request.states), encode(request.negatives or [request.negative])
        held = (embeddings.synopsis.states, embeddings.synopsis.negatives, embeddings.negative_prompt)
        if held != (request.states, request.negatives, request.negative):
            raise ValueError("the request's states and negative prompts are not those of the embeddings")
        embeddings.check(self.spec, self.text_hash)
        if self.text_hash is None:
            log.warning("these weights hold no text tower, so that of the embeddings could not be compared")
        return embeddings.anchors.to(self.device, self.dtype), embeddings.negative.to(self.device, self.dtype)

    def provenance(self, request: Request, embeddings: Embeddings | None) -> dict[str, object]:
        """Returns what a video of a request is made by, as plain data."""
        made: dict[str, object] = {"engine": "vstar-engine", "version": __version__}
        made |= {"model": self.spec.name, "weights": self.weights}
        run = {"device": str(self.device), "dtype": str(self.dtype)[6:], "torch": torch.__version__}
        if self.artifact is not None:
            run |= {"backend": self.artifact.identity["backend"], "built": self.artifact.name}
        if self.origin is not None:
            made["weights_from"] = dict(self.origin)
        held: dict[str, object] = {} if embeddings is None else {"embeddings": embeddings.file}
        return {**made, "request": asdict(request), **held, **self._changes(), **run}

    def _changes(self) -> dict[str, object]:
        """Returns what was done to the weights since they were read."""
        held: dict[str, object] = {}
        if self.loras:
            held["loras"] = [{"lora": str(lora), "sha256": lora.sha256} for lora in self.loras]
        if self.fp8 is not None:
            held[FP8] = {"layers": len(self.fp8), "largest_inputs": digest_of(self.fp8)}
        return held

    @property
    def identity(self) -> dict[str, object]:
        """Returns what a checkpoint of a video belongs to, beside its request: model, weights, dtype and back end."""
        backend = "eager" if self.artifact is None else self.artifact.name
        made = {"version": __version__, "model": self.spec.name, "weights": self.weights, "backend": backend}
        return {**made, "dtype": str(self.dtype)[6:], **self._changes()}


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
