"""The UNet forward under the clock: each variant checked against a wider dtype, then timed against its rivals."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from vstar_engine import unet as unet_module
from vstar_engine.config import model_named
from vstar_engine.device import dtype_named
from vstar_engine.kernels.temporal_attention import temporal_attention_ref
from vstar_engine.unet import UNet

from .blocks import count_flops, profile
from .rows import Rows, sentence
from .seeded import GUIDANCE_BRANCHES, LAYOUTS, lay_out, relative_error, seeded_unet, step_inputs
from .timing import Timing, interleave, synchronize

WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
# relative L2 against the same weights in WIDER. On a CPU a right forward shows 3e-3 in float16 (mini and full width),
# 2.3e-2 in bfloat16 and up to 6e-6 in float32; one without the regulariser 0.08 (full width, 2 frames) to 0.18 (mini, 4)
ERROR_BUDGET = {torch.float16: 2e-2, torch.bfloat16: 5e-2, torch.float32: 2e-5}
# what an allocation, a compiler or a kernel launch raises; anything else is this program's own fault and rises
FAILURES = (RuntimeError, OSError)


class WrongResult(RuntimeError):
    """A variant computes something else than the reference, so its speed says nothing."""


@dataclass(frozen=True)
class Settings:
    """What a run measures.

    `compiled` are the layouts to try torch.compile on, `matrix` is the side of the ceiling's matrix product, `budget` the
    seconds of the whole run, and `first_compile` those a first compilation must find left, since it cannot be stopped.
    """

    model: str = "videocrafter2"
    device: str = "cuda"
    dtype: str = "float16"
    size: tuple[int, ...] = (320, 512)
    frames: tuple[int, ...] = (16, 64)
    rounds: int = 5
    warmup: int = 1
    compiler: str = "inductor"
    compiled: tuple[str, ...] = LAYOUTS
    matrix: int = 8192
    budget: float = 240.0
    first_compile: float = 90.0


FULL = Settings()
REHEARSAL = Settings(
    "mini", "cpu", "float32", (32, 32), (2,), 2, 0, compiler="eager", compiled=LAYOUTS[:1], matrix=256, first_compile=0.0
)


@dataclass(frozen=True)
class Variant:
    """One way to run the forward; `mode` is eager, compile, or reference: eager without the temporal-attention kernel."""

    frames: int
    layout: str
    mode: str

    @property
    def name(self) -> str:
        return f"unet/{self.frames}f/{self.layout}/{self.mode}"


def with_reference(unet: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Runs a forward whose temporal attention is the reference in plain PyTorch."""
    with mock.patch.object(unet_module, "temporal_attention", temporal_attention_ref):
        return unet(*inputs)


class ForwardBench:
    """Networks, inputs and references of one run, made when first needed, and its rows."""

    def __init__(self, settings: Settings, rows: Rows):
        self.settings, self.rows = settings, rows
        self.spec, self.dtype = model_named(settings.model), dtype_named(settings.dtype)
        self.started = time.monotonic()
        self.unets: dict[str, UNet] = {}
        self.inputs: dict[int, list[Tensor]] = {}
        self.wanted: dict[int, Tensor] = {}
        self.flops: dict[int, dict[str, float]] = {}
        self.peak: float | None = None
        # the longest first call so far by mode; a variant of that mode begins only where as much is left
        self.longest = {"eager": 0.0, "reference": 0.0, "compile": settings.first_compile}

    def run(self) -> None:
        """Measures everything, the most telling first."""
        self.ceiling()
        for frames in self.settings.frames:
            self.reference(frames)
            eager = [Variant(frames, layout, "eager") for layout in LAYOUTS]
            self.contest([*eager, Variant(frames, LAYOUTS[0], "reference")])
            self.profile(Variant(frames, LAYOUTS[0], "eager"))
        for layout in self.settings.compiled:
            for frames in reversed(self.settings.frames):
                self.contest([Variant(frames, layout, mode) for mode in ("eager", "compile")])

    def params(self, variant: Variant | None = None, **more: object) -> dict[str, object]:
        """Lists what shaped a row."""
        run = {
            name: getattr(self.settings, name) for name in ("model", "device", "dtype", "size", "rounds", "warmup", "compiler")
        }
        return {**run, "batch": GUIDANCE_BRANCHES, **(asdict(variant) if variant else {}), **more}

    @contextmanager
    def failing_as(self, name: str, params: dict[str, object]) -> Iterator[None]:
        """Turns a failure into a row, so that the run goes on."""
        try:
            yield
        except FAILURES as error:
            self.rows.fail(name, params, sentence(error))

    def can_start(self, name: str, params: dict[str, object], mode: str, frames: int | None = None) -> bool:
        """Says whether there is time for one more of this mode and a reference to hold it to; if not, a row says so."""
        left = self.settings.budget - (time.monotonic() - self.started)
        if left < self.longest[mode]:
            self.rows.skip(name, params, f"{max(left, 0.0):.0f} s of the budget's {self.settings.budget:g} are left")
        elif frames is not None and frames not in self.inputs:
            self.rows.skip(name, params, f"there is no reference for {frames} frames")
        else:
            return True
        return False

    def ceiling(self) -> None:
        """Times a square matrix product, the most this dtype reaches here."""
        side, params = self.settings.matrix, self.params(side=self.settings.matrix)
        with self.failing_as("ceiling/matmul", params):
            a, b = (torch.randn(side, side, device=self.settings.device, dtype=self.dtype) for _ in range(2))
            timing = interleave({"matmul": lambda: a @ b}, rounds=20, warmup=3)["matmul"]
            self.peak = 2 * side**3 / timing.median / 1e12
            self.rows.write("ceiling/matmul", params, {**asdict(timing), "tflops": self.peak})

    def reference(self, frames: int) -> None:
        """Makes the inputs, counts their FLOPs and computes what is right, one dtype wider."""
        settings, wide = self.settings, WIDER[self.dtype]
        name, params = f"reference/{frames}f", self.params(frames=frames)
        if not self.can_start(name, params, "eager"):
            return
        with self.failing_as(name, params):
            inputs = step_inputs(self.spec, settings.size, frames, settings.device, self.dtype)
            self.flops[frames] = count_flops(self.spec.unet, inputs)
            exact = lay_out(seeded_unet(self.spec.unet, settings.device, self.dtype), LAYOUTS[0]).to(wide)
            latents, timestep, context, *rest = inputs
            self.wanted[frames] = exact(latents.to(wide), timestep, context.to(wide), *rest)
            self.inputs[frames] = inputs

    def unet(self, layout: str) -> UNet:
        """Gives the network in one layout, the same weights in each."""
        if layout not in self.unets:
            self.unets[layout] = lay_out(seeded_unet(self.spec.unet, self.settings.device, self.dtype), layout)
        return self.unets[layout]

    def forward(self, variant: Variant) -> Callable[[], Tensor]:
        """Binds the variant's network to its inputs."""
        unet: Callable[..., Tensor] = self.unet(variant.layout)
        if variant.mode == "compile":
            unet = torch.compile(unet, backend=self.settings.compiler, dynamic=False)
        if variant.mode == "reference":
            unet = partial(with_reference, unet)
        return partial(unet, *self.inputs[variant.frames])

    def contest(self, variants: list[Variant]) -> None:
        """Checks each variant, then times those that are right against each other."""
        calls: dict[str, Callable[[], Tensor]] = {}
        facts: dict[Variant, dict[str, object]] = {}
        for variant in variants:
            params = self.params(variant)
            if not self.can_start(variant.name, params, variant.mode, variant.frames):
                continue
            with self.failing_as(variant.name, params):
                call = self.forward(variant)
                facts[variant] = self.check(variant, call)
                calls[variant.name] = call
        names = list(calls)
        with self.failing_as(" and ".join(names), self.params(interleaved=names)):
            timings = interleave(calls, self.settings.rounds, self.settings.warmup)
            for variant, fact in facts.items():
                numbers = {**self.speed(variant, timings[variant.name]), **fact}
                self.rows.write(variant.name, self.params(variant, interleaved=names), numbers)

    def check(self, variant: Variant, call: Callable[[], Tensor]) -> dict[str, object]:
        """Runs a variant for its error and the seconds of its first call, and again for its memory."""
        begun = time.monotonic()
        error = relative_error(call(), self.wanted[variant.frames])
        first = time.monotonic() - begun
        self.longest[variant.mode] = max(self.longest[variant.mode], first)
        if not error <= ERROR_BUDGET[self.dtype]:
            raise WrongResult(f"WRONG, relative L2 error {error:.3g}, wanted at most {ERROR_BUDGET[self.dtype]:g}")
        return {"error": error, "first_call": first, "peak_bytes": self.peak_bytes(variant, call)}

    def peak_bytes(self, variant: Variant, call: Callable[[], Tensor]) -> int | None:
        """Measures the variant's own weights plus what a call allocates at most; None without a GPU."""
        if not torch.cuda.is_available():
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronize()
        weights = sum(parameter.nbytes for parameter in self.unet(variant.layout).parameters())
        return weights + torch.cuda.max_memory_allocated() - before

    def speed(self, variant: Variant, timing: Timing) -> dict[str, object]:
        """Adds TFLOP/s and their share of the ceiling to a timing."""
        tflops = self.flops[variant.frames]["whole"] / timing.median / 1e12
        return {**asdict(timing), "tflops": tflops, "share_of_matmul": self.peak and tflops / self.peak}

    def profile(self, variant: Variant) -> None:
        """Splits a forward by kind of block, apart from the timed rounds."""
        name, params, flops = f"profile/{variant.frames}f", self.params(variant), self.flops.get(variant.frames, {})
        if not self.can_start(name, params, variant.mode, variant.frames):
            return
        with self.failing_as(name, params):
            seconds = profile(self.unet(variant.layout), self.forward(variant), self.settings.rounds)
            numbers = {
                "seconds": seconds,
                "share": {kind: taken / seconds["whole"] for kind, taken in seconds.items()},
                "tflop": {kind: flops[kind] / 1e12 for kind in seconds},
                "tflops": {kind: flops[kind] / 1e12 / taken for kind, taken in seconds.items() if taken > 0},
            }
            self.rows.write(name, params, numbers)
