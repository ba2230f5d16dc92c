"""The engine: owns the text tower, the denoiser and the autoencoder, and takes states to a video."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vstar_engine.artifacts.built_engine import Artifact
from vstar_engine.artifacts.files import digest_of
from vstar_engine.artifacts.source_hash import engine_hash
from vstar_engine.backends import graph_memory
from vstar_engine.config import request_warnings
from vstar_engine.config.models import Spec, model_named
from vstar_engine.config.request import Request, rows_at_once
from vstar_engine.config.sampling import FP8, STEP_CACHE, Sampling, Tar
from vstar_engine.config.timeline import Position
from vstar_engine.machine import malloc, memory, threads
from vstar_engine.machine.device import device_named, dtype_named
from vstar_engine.networks.denoiser import Denoiser
from vstar_engine.networks.fp8 import convert
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.networks.unet import UNet
from vstar_engine.networks.vae import Vae
from vstar_engine.prompting.embeddings import Embeddings, Encode
from vstar_engine.prompting.interpolation import spread
from vstar_engine.prompting.tokenizer import tokenize
from vstar_engine.sampling.batch import Batch, Row
from vstar_engine.sampling.fp8_calibration import calibrate, check_choice
from vstar_engine.sampling.step_cache import StepCache
from vstar_engine.weights import checkpoint, key_map
from vstar_engine.weights.lora import Adapted, Lora

from . import __version__
from .backends import EAGER, TENSORRT, backend_named
from .errors import CheckpointError
from .loading import _under, load_text, open_weights
from .model_choice import Choice, check_options
from .video import Video, to_bytes
from .warmup import Clip, warm_up

log = logging.getLogger(__name__)

DEFAULT_SAMPLING, DEFAULT_TAR = Sampling(), Tar()
OnPart = Callable[[Video], None]
# frames of the clips that are warmed where nothing says which: on a GPU also the length most videos have
USUAL = {"cpu": (16,), "cuda": (16, 64)}


class Engine:
    """A loaded model; make one with `Engine.load`, then call `generate` as often as you like."""

    def __init__(
        self,
        spec: Spec,
        text: TextTower | None,
        denoiser: Denoiser,
        vae: Vae,
        device: torch.device,
        dtype: torch.dtype,
        weights: str,
        unused: list[str],
        text_hash: str | None,
        vocabulary: Set[str] = frozenset(),
        artifact: Artifact | None = None,
        path: Path | None = None,
        loras: Sequence[Lora] = (),
        fp8: Mapping[str, float] | None = None,
    ):
        self.spec, self.text, self.denoiser, self.vae = spec, text, denoiser, vae
        self.artifact = artifact  # the built engine that `denoiser` runs; none in eager
        self.device, self.dtype, self.weights, self.unused = device, dtype, weights, unused
        self.path, self.loras = path, tuple(loras)  # where the weights lie, and what is merged into the UNet's
        self.fp8 = fp8  # the largest input, in calibration, of each layer that multiplies in FP8; None where none does
        self.text_hash = text_hash
        self.vocabulary = vocabulary  # all words the model knows; empty where it may know any

    @staticmethod
    def load(
        model: str | None = None,
        weights: str | Path | None = None,
        backend: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        spatial_attention: str = "auto",
        text: str | None = "weights",
        engine: str | Path | Artifact | None = None,
        loras: Sequence[str] = (),
        graphs: bool = True,
        fp8: bool = False,
        warm: bool | Sequence[Clip] = False,
    ) -> "Engine":
        """Loads a model from a folder made by `vstar-engine convert`; `mini` needs none.

        `engine` is a folder made by `vstar-engine build`: its back end runs the UNet, and it says which model, weights, device
        and dtype are meant; without it these are videocrafter2 in eager PyTorch, in float32 on the CPU. `text` says where the
        text tower comes from: the weights, or None for nowhere; then videos are made from `Embeddings`. `loras` are FILE or
        FILE:STRENGTH, merged into the UNet; a built engine has its own in it. On a GPU the steps of `eager` and TensorRT replay
        CUDA graphs, one a shape, recorded in a shape's first two steps; not with `graphs=False`. With `fp8` layers multiply in
        FP8, scaled by what a short clip shows when it is loaded. `warm` names clips to take through all stages as it loads,
        True: those of `clips`, so that no request waits for kernels to be loaded, tried out and recorded.
        Raises ValueError for an unknown name, CheckpointError for bad weights, EngineError for an engine that is damaged or was
        shaped by anything else than is here, DeviceError for a device or dtype that cannot compute here, MissingLibrary where
        an optional library is asked for and absent.
        """
        artifact = engine if engine is None or isinstance(engine, Artifact) else Artifact.open(engine)
        choice = Choice.of(artifact, model, weights, backend, device, dtype)
        spec, runs = model_named(choice.model), backend_named(choice.backend)
        kind = dtype_named(choice.dtype)
        where = device_named(choice.device, kind)
        if text not in ("weights", None):
            raise ValueError(f"text must be 'weights' or None, got {text!r}")
        if artifact is None and choice.backend != EAGER:
            raise ValueError(
                f"backend {choice.backend} runs a built engine: make one with `vstar-engine build --backend {choice.backend}` "
                "and give its folder as engine"
            )
        if artifact is not None:
            check_options(artifact, spatial_attention, graphs)
        if fp8:
            check_choice(where, kind, artifact, text is not None)
        files = list(loras or (artifact.manifest["loras"] if artifact else ()))
        tensors = open_weights(spec, choice.weights, files)
        if artifact is not None:
            here = runs.machine(where, artifact.identity["options"])
            asked = {"weights_path": choice.weights, "loras": files}
            artifact.check(asked, weights=tensors.fingerprint(), sources=engine_hash(), **here)
        if where.type == "cpu":
            malloc.keep_pages()
            threads.warn(torch.get_num_threads())
        with torch.device("meta"):
            vae = Vae(spec.vae, encoder=False)
        tower, unused = load_text(spec, tensors, where, kind) if text else (None, _under(tensors, key_map.TEXT))
        unused += checkpoint.load(vae, tensors, key_map.VAE, device=where, dtype=kind)
        if artifact is None:
            denoiser = runs.load(spec, tensors, device=where, dtype=kind, spatial_attention=spatial_attention, graphs=graphs)
        else:
            recording = {"graphs": graphs} if choice.backend in TENSORRT else {}
            denoiser = runs.load(artifact, device=where, dtype=kind, **recording)
        unused += [name for name in tensors if not name.startswith((key_map.UNET, key_map.VAE, key_map.TEXT))]
        text_hash = checkpoint.text_hash(tensors, spec.text)
        log.info("%s: %d tensors used, %d not needed", spec.name, len(tensors) - len(unused), len(unused))
        log.debug("not needed: %s", ", ".join(unused))
        source = tensors.manifest.get("source", {}).get("sha256", tensors.path.name)
        vae = vae.eval().requires_grad_(False)
        vocabulary = frozenset(tensors.manifest.get("vocabulary", ()))
        merged = tensors.loras if isinstance(tensors, Adapted) else ()
        made = Engine(
            spec, tower, denoiser, vae, where, kind, source, unused, text_hash, vocabulary, artifact, tensors.path, merged
        )
        if fp8:
            made.fp8 = calibrate(denoiser, spec, made.embed)
            convert(denoiser, made.fp8)
            graph_memory.forget_graphs(denoiser)
            if where.type == "cpu":
                request_warnings.warn_once(f"{FP8} saves no time on a CPU; it shows the error that a GPU would make")
        if warm:
            made.warm(() if warm is True else warm)
        return made

    @property
    def records(self) -> bool:
        """Returns whether a shape's first steps take longer: they are recorded, or a library on a GPU readies itself."""
        return graph_memory.records(self.denoiser) or (self.artifact is not None and self.device.type == "cuda")

    def clips(self) -> list[Clip]:
        """Returns the clips to warm where none are named: a built engine's own, else usual ones."""
        frames, size = USUAL[self.device.type], self.spec.size
        if self.artifact is not None:
            frames, size = tuple(self.artifact.identity["frames"]) or frames, tuple(self.artifact.identity["size"] or size)
        return [(count, *size) for count in frames]

    def warm(self, clips: Sequence[Clip] = (), sampling: Sampling = DEFAULT_SAMPLING) -> None:
        """Takes clips, none: those of `clips`, through all stages, with as few steps as show every kind that `sampling` has.

        Another number of videos, another `fast` or `batch_guidance`, and guidance 1 are other steps. Raises as `run` does.
        """
        warm_up(self, clips or self.clips(), sampling)

    def adapt(self, loras: Sequence[str] = ()) -> None:
        """Changes which LoRAs (FILE or FILE:STRENGTH) are in the UNet; none gives back the weights' own values, to the bit.

        Raises CheckpointError for a file that does not fit, and the UNet stays as it was; ValueError for a built engine.
        """
        if self.fp8 is not None:
            raise ValueError(f"a network in {FP8} keeps the LoRAs it was loaded with; load another with `loras`")
        if self.artifact is not None or not isinstance(self.denoiser, UNet):
            raise ValueError("a built engine keeps the LoRAs it was built with; build another with `vstar-engine build --lora`")
        before = [str(lora) for lora in self.loras]
        try:
            self._refill(self.denoiser, loras)
        except CheckpointError:
            self._refill(self.denoiser, before)
            raise

    def _refill(self, unet: UNet, loras: Sequence[str]) -> None:
        """Reads the UNet's weights again, with LoRAs merged in."""
        graph_memory.forget_graphs(unet)
        tensors = open_weights(self.spec, self.path, loras)
        checkpoint.load(unet, tensors, key_map.UNET, device=self.device, dtype=self.dtype)
        self.loras = tensors.loras if isinstance(tensors, Adapted) else ()

    def generate(
        self,
        states: str | Sequence[str] | Embeddings,
        frames: int = 64,
        seed: int = 0,
        *,
        sampling: Sampling = DEFAULT_SAMPLING,
        tar: Tar | None = DEFAULT_TAR,
        size: tuple[int, int] | None = None,
        negative: str = "",
        mode: str = "linear",
        fps: float = 8.0,
        at: Sequence[Position] = (),
        durations: Sequence[float] = (),
        negatives: Sequence[str] = (),
        on_step: Callable[[int, int], None] | None = None,
    ) -> Video:
        """Makes one video that passes through `states` in order; a lone string is one state. See `run`.

        `at` or `durations` place the states (`timeline.place`) and `negatives` are one for each. Embeddings bring their states,
        places and negatives with them; other places may be given.
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
        request = Request(given, frames, seed, size, sampling, tar, negative, mode, fps, *places)
        return self.run(request, on_step, embeddings)

    def run(
        self,
        request: Request,
        on_step: Callable[[int, int], None] | None = None,
        embeddings: Embeddings | None = None,
        on_part: OnPart | None = None,
    ) -> Video:
        """Makes the video of a request; `on_step` hears (steps done, steps in all), `on_part` the video's frames as they come.

        `embeddings` hold the request's states and negatives and spare the text tower. A seed draws the same noise on every
        device and backend. Raises ValueError for a size or TAR level the model lacks, CheckpointError for embeddings of another
        text tower, MemoryShortage before starting when it would not fit.
        """
        (video,) = self.run_batch([request], on_step, None, [embeddings], on_part)
        assert video is not None
        return video

    def run_batch(
        self,
        requests: Sequence[Request],
        on_step: Callable[[int, int], None] | None = None,
        cancelled: Callable[[int], bool] | None = None,
        embeddings: Sequence[Embeddings | None] = (),
        on_part: OnPart | None = None,
    ) -> list[Video | None]:
        """Makes the videos of requests of the same frames, size and steps together; all else is each request's own.

        A video does not depend on those it rode with, but for the rounding of a wider batch. `cancelled` is asked before every
        step whether the request of that index is still wanted; those that are not give None. `on_part` hears runs of decoded
        frames, each a video with the provenance of its own, one video after another. Raises as `run` does.
        """
        batch = self.begin(requests, embeddings)
        while batch.rows and batch.done < batch.steps:
            for index in [row.index for row in batch.rows if cancelled and cancelled(row.index)]:
                batch.drop(index)
            if batch.rows:
                batch.step()
                if on_step:
                    on_step(batch.done, batch.steps)
        videos: list[Video | None] = [None] * len(requests)
        for row in batch.rows:
            videos[row.index] = self.finish(batch, row, on_part)
        return videos

    @torch.inference_mode()
    def begin(
        self, requests: Sequence[Request], embeddings: Sequence[Embeddings | None] = (), encode: Encode | None = None
    ) -> Batch:
        """Prepares requests that share frames, size and steps; `Batch.step` as often as they have steps, then `finish` each.

        `encode` takes the place of `embed`. Raises as `run` does.
        """
        if not requests:
            raise ValueError("there is no request in the batch; give at least one")
        requests = [self._fitted(request) for request in requests]
        first = requests[0]
        shapes = sorted({(r.frames, r.size, r.sampling.steps, *r.sampling.walk) for r in requests})
        if len(shapes) > 1:
            raise ValueError(f"the videos of a batch share frames, size and steps, got {', '.join(map(str, shapes))}")
        if self.artifact is not None:
            self.artifact.check_requests(*requests)
        footprint = memory.Footprint.of(first, self.spec, self.dtype)
        graph_memory.check(replace(footprint, batch=rows_at_once(requests)), self.denoiser, self.device)
        seconds = {"text": 0.0, "denoise": 0.0}
        with _timed(seconds, "text"):
            given = [*embeddings] or [None] * len(requests)
            rows = [
                Row.of(i, request, held, *self._context(request, held, encode or self.embed), self.spec)
                for i, (request, held) in enumerate(zip(requests, given, strict=True))
            ]
        # whichever of them are guided, their steps differ in the number of these alone, and fewer kinds are recorded
        rows.sort(key=lambda row: row.request.sampling.guidance == 1.0)
        cache = StepCache(self.spec.unet) if STEP_CACHE in first.sampling.fast else None
        return Batch(self.denoiser, self.spec, self.dtype, rows, seconds=seconds, cache=cache)

    @torch.inference_mode()
    def finish(self, batch: Batch, row: Row, on_part: OnPart | None = None) -> Video:
        """Decodes a video whose steps are done, as many frames at once as fit; `on_part` hears each run of them as a video."""
        seconds, request, done = dict(batch.seconds), row.request, 0
        assert request.size is not None
        frames = np.empty((request.frames, *request.size, 3), np.uint8)
        whole = Video(frames, request.fps, self._provenance(request, row.held), seconds)
        with _timed(seconds, "decode"):
            chunk = graph_memory.frames_at_once(self.spec, *request.size, self.dtype, self.denoiser, self.device)
            for pixels in self.vae.decoded(row.latents.to(self.dtype), chunk):
                part = frames[done : done + len(pixels)]
                part[:] = to_bytes(pixels.transpose(0, 1))
                done += len(part)
                if on_part:
                    on_part(replace(whole, frames=part))
        if self.device.type == "cpu":
            malloc.give_back()
        return whole

    def _fitted(self, request: Request) -> Request:
        """Returns a request with the size filled in, and says what the model was not trained for."""
        if self.artifact is not None and request.size is None and self.artifact.identity["size"]:
            request = replace(request, size=tuple(self.artifact.identity["size"]))
        request = request.fitted(self.spec)
        request_warnings.remark(request, self.spec, self.vocabulary, bool(self.loras))
        return request

    def _context(self, request: Request, embeddings: Embeddings | None, encode: Encode) -> tuple[Tensor, Tensor]:
        """Returns what the frames hear, (1, T, 77, C), and what they should not show, (1, 1 or T, 77, C)."""
        anchors, negative = self._encoded(request, embeddings, encode)
        where = request.anchors()
        context = spread(anchors.float(), request.frames, request.mode, where)[None].to(self.dtype)
        if len(negative) == 1:
            return context, negative[None]
        return context, spread(negative.float(), request.frames, request.mode, where)[None].to(self.dtype)

    @torch.inference_mode()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Encodes prompts: (n, 77, C) in the engine's dtype, on its device; ValueError without a text tower."""
        if self.text is None:
            raise ValueError("this engine was loaded without its text tower; give embeddings (`vstar-engine embed`)")
        return self.text(tokenize(prompts).to(self.device))

    def _encoded(self, request: Request, embeddings: Embeddings | None, encode: Encode) -> tuple[Tensor, Tensor]:
        """Returns the states (K, 77, C) and the negative prompt (1, 77, C), or those of each state (K, 77, C)."""
        if embeddings is None:
            return encode(request.states), encode(request.negatives or [request.negative])
        held = (embeddings.synopsis.states, embeddings.synopsis.negatives, embeddings.negative_prompt)
        if held != (request.states, request.negatives, request.negative):
            raise ValueError("the request's states and negative prompts are not those of the embeddings")
        embeddings.check(self.spec, self.text_hash)
        if self.text_hash is None:
            log.warning("these weights hold no text tower, so that of the embeddings could not be compared")
        return embeddings.anchors.to(self.device, self.dtype), embeddings.negative.to(self.device, self.dtype)

    def _provenance(self, request: Request, embeddings: Embeddings | None) -> dict[str, object]:
        made = {"engine": "vstar-engine", "version": __version__, "model": self.spec.name, "weights": self.weights}
        run = {"device": str(self.device), "dtype": str(self.dtype)[6:], "torch": torch.__version__}
        if self.artifact is not None:
            run |= {"backend": self.artifact.identity["backend"], "built": self.artifact.name}
        held: dict[str, object] = {} if embeddings is None else {"embeddings": embeddings.file}
        if self.loras:
            held["loras"] = [{"lora": str(lora), "sha256": lora.sha256} for lora in self.loras]
        if self.fp8 is not None:
            held[FP8] = {"layers": len(self.fp8), "largest_inputs": digest_of(self.fp8)}
        return {**made, "request": asdict(request), **held, **run}


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
