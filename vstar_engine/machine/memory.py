"""The memory that a generation needs, measured by running its networks on fake tensors, and the memory that is free."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vstar_engine.config.models import Spec
from vstar_engine.config.request import Clip, rows_at_once
from vstar_engine.config.windows import USUAL
from vstar_engine.errors import MemoryShortage
from vstar_engine.networks.appearance import Resampler
from vstar_engine.networks.denoiser import Denoiser
from vstar_engine.networks.image_encoder import ImageTower
from vstar_engine.networks.streaming_unet import ChunkDenoiser, StreamingUNet
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.networks.unet import UNet
from vstar_engine.networks.vae import CHUNK, Vae

from . import memory_groups
from .host_settings import kept_out

Network = TypeVar("Network", bound=nn.Module)

# beyond the counted tensors: logits inside temporal attention, convolution scratch, the allocator's slack
WORKSPACE = 384 * 2**20
MARGIN = 1.1
# more values a latent cell and model channel, and a pixel and VAE channel, than any model of the table holds at its peak: 26
# (videocrafter2, float16) to 77 (mini), and 6
UNET_BOUND, VAE_BOUND = 160, 16
# windows that may share a call
WINDOWS = (2, 4)
# of a clip in windows: latents, the next and the clean ones, noise of this step and the next, the merged prediction
LATENTS = 6


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that operators create, and their peak; inputs are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(x)._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor | torch.UntypedStorage)}
        out = func(*args, **(kwargs or {}))
        for storage in [_storage(x) for x in tree_leaves(out) if isinstance(x, torch.Tensor)]:
            if storage._cdata not in given and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def _storage(x: torch.Tensor | torch.UntypedStorage) -> torch.UntypedStorage:
    return x.untyped_storage() if isinstance(x, torch.Tensor) else x


@dataclass(frozen=True)
class Footprint:
    """The settings that determine a generation's memory; `batch` counts a network call's rows, `text`: with the text tower.

    `frames` are those of one call, `clip` those of the whole clip where it is made in windows, else 0.
    """

    spec: Spec
    frames: int
    height: int
    width: int
    dtype: torch.dtype
    batch: int
    text: bool = True
    clip: int = 0

    @staticmethod
    def of(clip: Clip, spec: Spec, dtype: torch.dtype, text: bool = True) -> "Footprint":
        """Reads a clip whose size is filled in."""
        assert clip.size is not None
        whole = 0 if clip.pass_frames == clip.frames else clip.frames
        return Footprint(spec, clip.pass_frames, *clip.size, dtype, rows_at_once([clip]), text, whole)


@contextmanager
def without_data() -> Iterator[None]:
    """Runs networks on shapes alone inside the block: nothing is allocated or computed."""
    with FakeTensorMode(), torch.no_grad(), kept_out():
        yield


def in_dtype(module: Network, dtype: torch.dtype) -> Network:
    """Returns a network without data whose parameters have `dtype`; `Module.to` cannot convert them."""
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
    return module


@lru_cache(maxsize=64)
def weight_bytes(spec: Spec, dtype: torch.dtype, text: bool = True) -> int:
    """Returns the bytes of all weights, with or without the text tower."""
    with torch.device("meta"):
        parts: list[nn.Module] = [Vae(spec.vae, encoder=False), *([TextTower(spec.text)] if text else [])]
        if spec.streaming is None:
            parts.append(UNet(spec.unet))
        else:
            resampler = Resampler(spec.unet.context_dim, spec.streaming.resampler, spec.unet.image_tokens)
            parts += [StreamingUNet(spec), ImageTower(spec.streaming.image), resampler]
    return sum(p.numel() for part in parts for p in part.parameters()) * dtype.itemsize


def bound_bytes(request: Footprint) -> int:
    """Returns more bytes than a step or decoding a frame ever holds; at once, where `activation_bytes` runs the networks."""
    spec, pixels = request.spec, request.height * request.width
    cells = request.batch * request.frames * pixels // spec.vae.factor**2
    values = max(UNET_BOUND * cells * spec.unet.model_channels, VAE_BOUND * pixels * spec.vae.channels)
    return int(MARGIN * values * request.dtype.itemsize) + WORKSPACE + clip_bytes(request)


@lru_cache(maxsize=64)
def activation_bytes(request: Footprint) -> int:
    """Returns the peak bytes, without weights, of one denoising step and of decoding frame by frame.

    Of a clip in windows: of one window, and of the clip's latents.
    """
    spec, frames = request.spec, request.frames
    h, w = request.height // spec.vae.factor, request.width // spec.vae.factor
    text = spec.text.context_length + spec.unet.image_tokens, spec.unet.context_dim
    with without_data():
        unet: Any = in_dtype(UNet(spec.unet), request.dtype)
        if spec.streaming is not None:
            known = torch.empty(request.batch, 3, spec.streaming.overlap, request.height, request.width, dtype=request.dtype)
            unet = ChunkDenoiser(in_dtype(StreamingUNet(spec), request.dtype), known)
        with LiveBytes() as denoising:
            unet(
                torch.empty(request.batch, spec.unet.in_channels, frames, h, w, dtype=request.dtype),
                torch.empty(request.batch, 1, dtype=torch.int64),
                unet.prepare_context(torch.empty(request.batch, frames, *text, dtype=request.dtype)),  # type: ignore[arg-type]
                torch.empty(request.batch, dtype=torch.int64),
                torch.empty(1, spec.unet.levels, frames, dtype=torch.float32),
            )
    peak = max(denoising.peak, frame_bytes(spec, request.height, request.width, request.dtype))
    return int(MARGIN * peak) + WORKSPACE + clip_bytes(request)


def clip_bytes(request: Footprint) -> int:
    """Returns the bytes of the whole clip's latents where it is made in windows, else 0."""
    spec = request.spec
    cells = request.clip * request.height * request.width // spec.vae.factor**2
    return LATENTS * cells * spec.unet.in_channels * torch.float32.itemsize


@lru_cache(maxsize=64)
def frame_bytes(spec: Spec, height: int, width: int, dtype: torch.dtype) -> int:
    """Returns the peak bytes of decoding one frame."""
    with without_data():
        vae = in_dtype(Vae(spec.vae, encoder=False), dtype)
        latents = torch.empty(1, spec.unet.out_channels, 1, height // spec.vae.factor, width // spec.vae.factor, dtype=dtype)
        with LiveBytes() as decoding:
            vae.decode(latents)
    return decoding.peak


def frames_within(spec: Spec, height: int, width: int, dtype: torch.dtype, free: int) -> int:
    """Returns how many frames may be decoded at once in `free` bytes; 0 where not even one fits."""
    return min(CHUNK, max(0, int((free - WORKSPACE) / (MARGIN * frame_bytes(spec, height, width, dtype)))))


def frames_at_once(spec: Spec, height: int, width: int, dtype: torch.dtype, denoiser: Denoiser, device: torch.device) -> int:
    """Returns how many frames to decode at once, at least one; drops the denoiser's CUDA graphs where none would fit."""

    def fitting() -> int:
        return frames_within(spec, height, width, dtype, available_bytes(device) - denoiser.graph_bytes())

    return fitting() or (denoiser.forget_graphs() and fitting()) or 1


def available_bytes(device: torch.device) -> int:
    """Returns the device's free bytes with those that PyTorch's allocator holds unused, which include CUDA graphs' memory.

    On the CPU, returns the free bytes within the process's control groups.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    free, left = psutil.virtual_memory().available, memory_groups.free_bytes()
    return free if left is None else min(free, left)


def check(request: Footprint, device: torch.device, loaded: bool, kept: int = 0) -> None:
    """Raises MemoryShortage, naming the nearest setting that fits, unless the request fits.

    `loaded`: the weights are in memory already; `kept`: available bytes that are reserved for others.
    """
    weights = 0 if loaded else weight_bytes(request.spec, request.dtype, request.text)
    free = available_bytes(device) - kept
    if weights + bound_bytes(request) <= free:
        return
    needed = weights + activation_bytes(request)
    if needed > free:
        long = f"{request.clip} frames in windows of " if request.clip else ""
        raise MemoryShortage(
            f"{long}{request.frames} frames of {request.height}x{request.width} in {str(request.dtype)[6:]} need about "
            f"{needed / 2**30:.1f} GiB on {device} where {free / 2**30:.1f} GiB are free; {_nearest(request, free, loaded)}"
        )


def windows_at_once(request: Footprint, denoiser: Denoiser, device: torch.device) -> int:
    """Returns how many windows one call takes: on a GPU as many of WINDOWS as fit; on a CPU one fills the cores."""
    if device.type == "cpu":
        return 1
    free = available_bytes(device) - denoiser.graph_bytes()
    wide = [count for count in WINDOWS if activation_bytes(replace(request, batch=count * request.batch)) <= free]
    return max(wide, default=1)


def make_room(request: Footprint, denoiser: Denoiser, device: torch.device) -> None:
    """Drops the CUDA graphs of earlier shapes where a batch needs their memory; MemoryShortage where that is not enough."""
    try:
        check(request, device, loaded=True, kept=denoiser.graph_bytes())
    except MemoryShortage:
        if not denoiser.forget_graphs():
            raise
        check(request, device, loaded=True)


def _nearest(request: Footprint, free: int, loaded: bool) -> str:
    def fits(candidate: Footprint) -> bool:
        weights = 0 if loaded else weight_bytes(candidate.spec, candidate.dtype, candidate.text)
        return weights + activation_bytes(candidate) <= free

    if request.batch > 1:
        request = replace(request, batch=1)
        if fits(request):
            return "it fits with --no-batch-guidance"
    if request.dtype == torch.float32 and not loaded:
        half = replace(request, dtype=torch.float16)
        if fits(half):
            return "it fits with --no-batch-guidance --dtype float16"
    shorter = _most_frames(request, free, loaded)
    while shorter and not fits(replace(request, frames=shorter)):
        shorter -= max(1, shorter // 16)
    if shorter and request.clip:
        return f"windows of {shorter} frames fit with --no-batch-guidance"
    if shorter:
        window, overlap = USUAL
        longer = f", or all of them in windows: --window {window} --overlap {overlap}" if window <= shorter else ""
        return f"{shorter} frames fit with --no-batch-guidance{longer}"
    small = request.spec.multiple
    if fits(replace(request, frames=1, height=small, width=small)):
        return "not even one frame of this size fits: choose a smaller --size"
    return "the model itself does not fit"


def _most_frames(request: Footprint, free: int, loaded: bool) -> int:
    """Estimates the longest clip that fits, taking memory as linear in the number of frames."""
    one, all_ = (activation_bytes(replace(request, frames=n)) for n in (1, request.frames))
    weights = 0 if loaded else weight_bytes(request.spec, request.dtype, request.text)
    if request.frames == 1 or all_ == one:
        return 0
    return max(0, min(request.frames - 1, 1 + int((free - weights - one) * (request.frames - 1) / (all_ - one))))
