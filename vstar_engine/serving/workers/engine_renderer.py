"""The worker's renderer: an engine with a cache of text embeddings, precomputed bundles, and previews."""

import gc
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vstar_engine.config.request import Request
from vstar_engine.config.windows import LONGEST
from vstar_engine.engine import Engine, OnFrames
from vstar_engine.errors import MemoryShortage
from vstar_engine.prompting.embeddings import Embeddings, Encode
from vstar_engine.sampling.batch import Batch, BatchRow
from vstar_engine.serving.jobs.job import Job
from vstar_engine.video import Video

from .job_checkpoints import JobCheckpoints

CACHE_BYTES = 256 * 2**20
PREVIEW_FRAMES = 4
# regularises the fit of colours, since a warm-up video may have few of them
RIDGE = 1e-3
# phrases of PyTorch's RuntimeError when memory runs out on the CPU
NO_MEMORY = ("can't allocate memory", "not enough memory")


class TextCache:
    """An LRU cache of text embeddings, limited in bytes.

    Its keys are whole lists of texts: the last bits of an embedding depend on how many texts were encoded with it.
    """

    def __init__(self, encode: Encode, most: int = CACHE_BYTES):
        self.encode, self.most = encode, most
        self.kept: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()
        self.bytes = self.hits = self.misses = 0

    def __call__(self, texts: Sequence[str]) -> Tensor:
        key = tuple(texts)
        if key in self.kept:
            self.hits += 1
            self.kept.move_to_end(key)
            return self.kept[key]
        self.misses += 1
        made = self.encode(texts)
        if made.nbytes <= self.most:
            self.kept[key] = made
            self.bytes += made.nbytes
        while self.bytes > self.most:
            _, oldest = self.kept.popitem(last=False)
            self.bytes -= oldest.nbytes
        return made


class EngineRenderer:
    """A `Renderer` that runs an engine."""

    def __init__(
        self,
        engine: Engine,
        bundles: Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        checkpoints: JobCheckpoints | None = None,
    ):
        self.engine, self.bundles, self.checkpoints = engine, bundles, checkpoints
        self.texts = TextCache(engine.embed, cache_bytes)
        self.colours: Tensor | None = None  # (5, 3): maps a latent cell's 4 channels and a constant 1 to red, green and blue

    def facts(self) -> dict[str, Any]:
        """Returns the facts of `events.FACTS`, except those that warm-up measures."""
        engine, artifact = self.engine, self.engine.artifact
        return {
            "model": engine.spec.name,
            "weights": engine.weights,
            "backend": "eager" if artifact is None else artifact.identity["backend"],
            "device": str(engine.device),
            "dtype": str(engine.dtype)[6:],
            "size": list(engine.spec.size),
            "multiple": engine.spec.multiple,
            "levels": engine.spec.unet.levels,
            "max_frames": LONGEST if artifact is None else artifact.most_frames,
            "text": engine.text is not None,
        }

    def buckets(self) -> list[tuple[int, int, int]]:
        return self.engine.clips()

    def most_at_once(self) -> int:
        """Returns the largest batch of guided videos that the network was built for."""
        return 2**16 if self.engine.artifact is None else max(1, self.engine.artifact.identity["batch"] // 2)

    def begin(self, jobs: Sequence[Job]) -> Batch:
        """Starts a batch of jobs of one shape; raises what `Engine.begin` raises."""
        held = [None if job.embeddings is None else self._bundle(job.embeddings) for job in jobs]
        batch = self.engine.begin([self._request(job) for job in jobs], held, self.texts)
        if self.checkpoints is not None and len(jobs) == 1:
            self.checkpoints.begin(self.engine, batch, jobs[0].id)
        return batch

    def _request(self, job: Job) -> Request:
        """Returns a job's request; guidance takes two passes if the engine was built for a batch of one."""
        request, artifact = job.request(), self.engine.artifact
        if artifact is None or artifact.identity["batch"] > 1:
            return request
        return replace(request, sampling=replace(request.sampling, batch_guidance=False))

    def _bundle(self, id: str) -> Embeddings:
        if self.bundles is None or Path(id).name != id:
            raise ValueError(f"there are no embeddings {id!r} on this worker")
        return Embeddings.read(self.bundles / f"{id}.safetensors")

    def step(self, batch: Batch) -> None:
        """Takes one step and waits for the device, so that a cancellation takes effect before the next step."""
        batch.step()
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        if self.checkpoints is not None:
            self.checkpoints.keep(self.engine, batch)

    def finish(self, batch: Batch, row: BatchRow, on_frames: OnFrames | None = None) -> Video:
        video = self.engine.finish(batch, row, on_frames)
        if self.checkpoints is not None:
            self.checkpoints.discard(row)
        return video

    def learn_colours(self, row: BatchRow, video: Video) -> None:
        """Fits a linear map from the channels of a latent cell to the mean colour of its pixels."""
        factor = self.engine.spec.vae.factor
        pixels = torch.from_numpy(video.frames).double().unflatten(1, (-1, factor)).unflatten(3, (-1, factor))
        colours = pixels.mean(dim=(2, 4)).flatten(0, 2)  # (T, h, factor, w, factor, 3) -> (cells, 3)
        cells = _with_one(row.latents[0].movedim(0, -1).flatten(0, 2).double().cpu())
        square = cells.T @ cells / len(cells) + RIDGE * torch.eye(cells.shape[1], dtype=torch.float64)
        self.colours = torch.linalg.solve(square, cells.T @ colours / len(cells))

    @torch.inference_mode()
    def preview(self, row: BatchRow) -> np.ndarray | None:
        """Returns some current frames side by side, one pixel per latent cell, (h, n w, 3) uint8."""
        if row.clean is None or self.colours is None:
            return None
        frames = row.clean[0].movedim(0, -1)
        taken = torch.linspace(0, len(frames) - 1, min(PREVIEW_FRAMES, len(frames))).long()
        cells = frames[taken.to(frames.device)].double().cpu()
        strip = torch.cat(list((_with_one(cells) @ self.colours).clamp(0, 255)), dim=1)
        return strip.byte().numpy()

    def counters(self) -> dict[str, int]:
        """Returns the counters of the embedding cache."""
        return {"cache_hits": self.texts.hits, "cache_misses": self.texts.misses, "cache_bytes": self.texts.bytes}

    def is_shortage(self, error: BaseException) -> bool:
        """Returns whether an error means that memory ran out."""
        known = isinstance(error, MemoryError | MemoryShortage | torch.OutOfMemoryError)
        return known or any(words in str(error) for words in NO_MEMORY)

    def is_fatal(self, error: BaseException) -> bool:
        """Returns whether an error makes the device unusable for this process."""
        return isinstance(error, torch.AcceleratorError)

    def release(self) -> None:
        """Frees the memory of a failed batch and all captured CUDA graphs."""
        self.engine.denoiser.forget_graphs()
        gc.collect()
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()


def _with_one(cells: Tensor) -> Tensor:
    return torch.cat([cells, torch.ones_like(cells[..., :1])], dim=-1)


def load(settings: dict[str, Any]) -> EngineRenderer:
    """Loads the server's model; `settings["engine"]` holds the arguments of `Engine.load`."""
    bundles = settings.get("embeddings")
    engine = Engine.load(**settings["engine"])
    folder = settings.get("checkpoints")
    checkpoints = None if folder is None else JobCheckpoints(Path(folder))
    bundles = None if bundles is None else Path(bundles)
    return EngineRenderer(engine, bundles, settings.get("cache_bytes", CACHE_BYTES), checkpoints)
