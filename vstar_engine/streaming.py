"""Makes a video chunk by chunk, in memory that does not grow with its length. StreamingT2V, arXiv 2403.14773."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vstar_engine.artifacts.files import digest_of, write_aside
from vstar_engine.config.request import Request
from vstar_engine.config.streamed import StreamedRequest
from vstar_engine.machine import memory
from vstar_engine.machine.host_settings import undisturbed
from vstar_engine.networks.streaming_unet import ChunkDenoiser, StreamingUNet, streaming_of
from vstar_engine.prompting.embeddings import Embeddings
from vstar_engine.prompting.interpolation import spread_at
from vstar_engine.sampling.streaming import Anchor, ChunkNoise, chunk_batch, schedule_of

from .engine import Engine
from .video import Video, to_bytes

OnStep = Callable[[int, int, int], None]


@dataclass(frozen=True)
class StreamState:
    """All that the next chunk needs: how many are done, the last frames and the anchor in [-1, 1], and the generator's state.

    `known` is (1, 3, overlap, H, W), `anchor` (1, 3, H, W).
    """

    done: int
    known: Tensor
    anchor: Tensor
    generator: Tensor

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Writes the state with plain data `about` beside it; the file is whole or the old one. OutputError if it cannot be."""
        tensors = {"known": self.known.cpu(), "anchor": self.anchor.cpu(), "generator": self.generator}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with write_aside(path) as aside:
            save_file(tensors, aside, {"about": json.dumps({**about, "done": self.done})})

    @staticmethod
    def read(path: Path) -> tuple["StreamState", dict[str, Any]]:
        """Reads a state and what stands beside it; ValueError for a file that is none."""
        from safetensors import safe_open

        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["about"])
            return StreamState(done=about.pop("done"), **load_file(path)), about
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no state of a video to go on with ({error})") from error


class Stream:
    """A video in chunks: iterate over it for runs of frames. `state` is then that after the last one given."""

    def __init__(
        self,
        engine: Engine,
        request: StreamedRequest,
        start: np.ndarray | None = None,
        state: StreamState | None = None,
        embeddings: Embeddings | None = None,
        about: dict[str, Any] | None = None,
    ):
        """Begins with the first chunk `start`, (chunk, H, W, 3) uint8 in the request's size, or goes on from a `state`.

        `about` is said of the first chunk in the video's provenance. Raises ValueError for settings that the model lacks,
        MemoryShortage where a chunk does not fit.
        """
        spec = engine.spec
        self.engine, self.streaming = engine, streaming_of(spec)
        if not isinstance(engine.denoiser, StreamingUNet) or engine.image is None:
            raise ValueError(f"the engine of {spec.name} holds no streaming network")
        self.network = engine.denoiser
        self.request, self.embeddings, self.start = request.fitted(spec), embeddings, start
        assert self.request.size is not None
        schedule_of(request.sampling)
        chunk, overlap = self.streaming.chunk, self.streaming.overlap
        # one chunk, with the settings of the whole
        whole = {one.name: getattr(self.request, one.name) for one in fields(Request)}
        plain = {"states": ("",), "at": (), "durations": (), "negatives": (), "negative": ""}
        self.chunk = Request(**{**whole, **plain, "frames": chunk})
        memory.make_room(memory.Footprint.of(self.chunk, spec, engine.dtype), engine.denoiser, engine.device)
        self.generator = torch.Generator().manual_seed(request.seed)
        if state is None:
            if start is None or start.shape != (chunk, *self.request.size, 3):
                got = "nothing" if start is None else start.shape
                raise ValueError(f"the first chunk is {(chunk, *self.request.size, 3)} bytes, got {got}")
            pixels = torch.from_numpy(start).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            state = StreamState(0, pixels[:, :, -overlap:], pixels[:, :, 0], self.generator.get_state())
        self.generator.set_state(state.generator)
        self.state = state
        self.provenance = engine.provenance(self.request, embeddings) | {"first_chunk": about or {}}
        self.seconds = {"text": 0.0, "denoise": 0.0, "decode": 0.0}
        self._prepare()

    @undisturbed
    @torch.inference_mode()
    def _prepare(self) -> None:
        """Encodes the texts and the anchor, once for all chunks."""
        engine, image = self.engine, self.engine.image
        assert image is not None
        self.cond, self.uncond = engine.encoded(self.request, self.embeddings)
        anchor = self.state.anchor.to(engine.device, engine.dtype)
        self.anchor = Anchor.of(anchor, image.tower, image.resampler)

    @property
    def frames(self) -> int:
        """Returns how many frames the chunks that are done have, those that are cut off with them."""
        done = self.state.done
        return done and done * (self.streaming.chunk - self.streaming.overlap) + self.streaming.overlap

    def __iter__(self) -> Iterator[Video]:
        return self.run()

    def run(self, on_step: OnStep | None = None) -> Iterator[Video]:
        """Yields the frames of each chunk; `on_step` gets (chunk, steps done, all steps) within a chunk."""
        if self.state.done == 0:
            assert self.start is not None
            self.state = replace(self.state, done=1)
            yield self._part(self.start[: None if self.request.endless else self.request.frames])
        while self.request.endless or self.frames < self.request.frames:
            before = self.frames
            fresh = self._next(on_step)
            yield self._part(fresh if self.request.endless else fresh[: self.request.frames - before])

    def _part(self, frames: np.ndarray) -> Video:
        return Video(frames, self.request.fps, self.provenance, dict(self.seconds))

    def texts(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Returns the text embeddings of a chunk's frames for both branches, (1, 1 or T, 77, C): 1 where all hear the same."""
        first = chunk * (self.streaming.chunk - self.streaming.overlap)
        last = self.request.frames - 1
        where = [min(frame, last) for frame in range(first, first + self.streaming.chunk)]

        def rows(anchors: Tensor) -> Tensor:
            if len(anchors) == 1:
                return anchors[None]
            return spread_at(anchors.float(), self.request.anchors, where, self.request.mode)[None].to(self.engine.dtype)

        return rows(self.cond), rows(self.uncond)

    @undisturbed
    @torch.inference_mode()
    def _next(self, on_step: OnStep | None) -> np.ndarray:
        """Makes the next chunk and returns its new frames, (chunk - overlap, H, W, 3) uint8."""
        engine, spec, chunk = self.engine, self.engine.spec, self.state.done
        assert self.chunk.size is not None
        known = self.state.known.to(engine.device, engine.dtype)
        noise = ChunkNoise.drawn(spec, self.chunk.size, self.streaming.chunk, self.generator)
        batch = chunk_batch(
            ChunkDenoiser(self.network, known), spec, engine.dtype, self.chunk, self.texts(chunk), self.anchor, noise
        )
        while batch.done < batch.steps:
            batch.step()
            if on_step:
                on_step(chunk, batch.done, batch.steps)
        at_once = memory.frames_at_once(spec, *self.chunk.size, engine.dtype, engine.denoiser, engine.device)
        latents = batch.rows[0].latents[:, :, self.streaming.overlap :].to(engine.dtype)
        pixels = torch.cat(list(engine.vae.decoded(latents, at_once))).float().clamp(-1, 1).transpose(0, 1)
        known = pixels[None, :, -self.streaming.overlap :].cpu()
        self.state = replace(self.state, done=chunk + 1, known=known, generator=self.generator.get_state())
        self.seconds["denoise"] += batch.seconds["denoise"]
        return to_bytes(pixels)

    def identity(self) -> str:
        """Names the request and its weights, for a state to be held to."""
        return digest_of([json.loads(json.dumps(asdict(self.request), default=str)), self.engine.weights])
