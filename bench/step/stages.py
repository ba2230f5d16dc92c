"""A video's stages one by one: text, one guided step of the UNet, the sampler around it, decoding, and the mp4.

Beside the engine's stand those of the published path: float32, two passes, contiguous memory, its attention, PyTorch's own
operators, its preview off. What surrounds the networks, the sampler and the mp4, is the same for both.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vstar_engine.bench.harness.block_costs import flop_counter
from vstar_engine.bench.harness.ceilings import ceilings
from vstar_engine.bench.harness.contest import Contest, Pace, Provider, hold
from vstar_engine.bench.harness.random_networks import Network, lay_out, relative_error, seeded
from vstar_engine.bench.harness.rows import OK, ResultFile, ResultRow
from vstar_engine.bench.harness.timing import Timing, seconds_of, seconds_of_second
from vstar_engine.bench.ops.pytorch_layers import map_pages, unfused
from vstar_engine.config.sampling import Sampling
from vstar_engine.errors import MissingLibrary
from vstar_engine.machine import malloc
from vstar_engine.networks.layers import Norm
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.networks.vae import CHUNK, Vae
from vstar_engine.prompting.tokenizer import END, START
from vstar_engine.sampling.ddim import sample
from vstar_engine.sampling.schedule import Schedule
from vstar_engine.video import Video, to_bytes

from .ladder import ENGINE, GRAPH, Step
from .workload import ERROR_BUDGET, Workload

# five states and the negative prompt
PROMPTS, WORDS = 6, 20
# H.264 at the engine's quality on a smooth picture shows 0.01
MP4_BUDGET = 0.05
TEXT, STEP, SAMPLER, DECODE, MP4 = "text", "UNet step", "sampler", "VAE", "mp4"
OURS, PUBLISHED = "ours", "published"
Prepare = Callable[[], Callable[[], object]]


def named(name: str, path: str) -> str:
    """Returns a stage's name in the rows: the engine's own is the stage's, another path's has the path's name behind it."""
    return name if path == OURS else f"{name}, {path}"


def clock(workload: Workload) -> Callable[[Callable[[], object]], list[float]]:
    """On a CPU the paths keep and give back memory each in its way, so each runs untimed before it is timed."""
    return seconds_of_second if workload.device.type == "cpu" else seconds_of


@dataclass(frozen=True)
class FastestCall:
    """What a stage takes at least: FLOPs and bytes, where known."""

    flops: float | None = None
    bytes: float | None = None

    @staticmethod
    def of(
        make: Callable[[], Network], run: Callable[[Network], object], times: int, dtype: torch.dtype, moved: float
    ) -> "FastestCall":
        """Counts `times` runs of a network, without data: its weights are read once, and the bytes `moved`."""
        with torch.device("meta"), torch.no_grad(), flop_counter() as counter:
            network = make()
            run(network)
        # of a table of embeddings few lines are read
        layers = [layer for layer in network.modules() if not isinstance(layer, torch.nn.Embedding)]
        weights = sum(parameter.numel() for layer in layers for parameter in layer.parameters(recurse=False))
        return FastestCall(float(times * counter.get_total_flops()), weights * dtype.itemsize + moved)


def stage(
    workload: Workload,
    name: str,
    paths: Mapping[str, Prepare],
    error: Callable,
    budget: float,
    least: FastestCall = FastestCall(),
) -> Contest:
    """Makes a stage a contest of its paths."""
    case = {"part": "stages", **workload.case}
    return Contest(
        *(
            "pipeline",
            case,
            workload.dtype,
            workload.device,
            [Provider(named(name, path), take) for path, take in paths.items()],
        ),
        lambda _, answer: error(answer),
        budget,
        least.bytes,
        least.flops,
        ceilings(workload.device, workload.dtype),
        clock(workload),
    )


def text(workload: Workload) -> Contest:
    """Returns the text tower over five states and a negative prompt; making tokens of words is not counted."""
    tokens = torch.zeros(PROMPTS, workload.spec.text.context_length, dtype=torch.int64, device=workload.device)
    tokens[:, : WORDS + 2] = torch.randint(0, START, (PROMPTS, WORDS + 2), device=workload.device)
    tokens[:, 0], tokens[:, WORDS + 1] = START, END

    def tower(dtype: torch.dtype) -> TextTower:
        return seeded(lambda: TextTower(workload.spec.text), workload.device, workload.dtype).to(dtype)

    exact = tower(torch.float64)(tokens)
    least = FastestCall.of(
        lambda: TextTower(workload.spec.text),
        lambda meta: meta(tokens.to("meta")),
        1,
        workload.dtype,
        float(exact.numel() * workload.dtype.itemsize),
    )
    paths = {OURS: lambda: partial(tower(workload.dtype), tokens), PUBLISHED: lambda: partial(tower(torch.float32), tokens)}
    return stage(workload, TEXT, paths, partial(relative_error, wanted=exact), ERROR_BUDGET[workload.dtype], least)


def sampler(workload: Workload, steps: int) -> Contest:
    """Returns everything of `steps` sampling steps but the network: guidance, the update and its noise, in float32."""
    height, width = (side // workload.spec.vae.factor for side in workload.size)
    shape = (1, workload.spec.unet.in_channels, workload.frames, height, width)
    latents, cond, uncond = torch.randn(3, *shape, device=workload.device).unbind()
    tape, schedule = torch.randn(steps, *shape), Schedule.ddim(steps)

    def run(dtype: torch.dtype) -> Tensor:
        def denoise(x: Tensor, timestep: Tensor, index: int) -> tuple[Tensor, Tensor]:
            return cond.to(dtype), uncond.to(dtype)

        *_, last = sample(denoise, schedule, latents.to(dtype), guidance=Sampling.guidance, noise=tape.to(dtype))
        return last[2]

    error = partial(relative_error, wanted=run(torch.float64))
    return stage(workload, SAMPLER, {OURS: lambda: partial(run, torch.float32)}, error, ERROR_BUDGET[torch.float32])


def decoder(workload: Workload, path: str = OURS) -> Vae:
    """Returns a path's autoencoder: laid out as the engine loads it, or as published; its weights are of the run's dtype."""
    vae = seeded(lambda: Vae(workload.spec.vae, encoder=False), workload.device, workload.dtype)
    if path == OURS:
        return lay_out(vae, "channels_last")
    return unfused(vae.to(torch.float32), Norm)


def decode(workload: Workload) -> Contest:
    """Returns the autoencoder over the whole clip, and its frames as bytes; the first and last frame are held to float64."""
    height, width = (side // workload.spec.vae.factor for side in workload.size)
    latents = torch.randn((1, workload.spec.unet.in_channels, workload.frames, height, width), device=workload.device).to(
        workload.dtype
    )
    exact = decoder(workload, PUBLISHED).double().decode(latents[:, :, [0, -1]].double())[0].transpose(0, 1)
    video = np.empty((workload.frames, *workload.size, 3), np.uint8)

    def run(vae: Vae, x: Tensor, pages: Callable[[], object]) -> Tensor:
        if workload.device.type == "cpu":
            pages()
        ends, done = [], 0
        for pixels in vae.decoded(x, CHUNK):
            video[done : done + len(pixels)] = to_bytes(pixels.transpose(0, 1))
            done += len(pixels)
            ends.append(pixels[[0, -1]])
        return torch.cat(ends)[[0, -1]]

    one = torch.empty_like(latents[:, :, :1], device="meta", dtype=torch.float32)
    moved = float(latents.nbytes + video.nbytes)
    least = FastestCall.of(
        lambda: Vae(workload.spec.vae, encoder=False), lambda meta: meta.decode(one), workload.frames, workload.dtype, moved
    )
    paths: dict[str, Prepare] = {
        OURS: lambda: partial(run, decoder(workload), latents, malloc.keep_pages),
        PUBLISHED: lambda: partial(run, decoder(workload, PUBLISHED), latents.float(), map_pages),
    }
    return stage(workload, DECODE, paths, partial(relative_error, wanted=exact), ERROR_BUDGET[workload.dtype], least)


def picture(workload: Workload) -> np.ndarray:
    """Draws a smooth, moving picture: (T, H, W, 3) uint8. Noise would be the worst case of any video coder."""
    height, width = workload.size
    t, y, x = np.meshgrid(np.arange(workload.frames) / 8, np.arange(height) / 24, np.arange(width) / 24, indexing="ij")
    channels = [np.sin(x + t), np.sin(y - t), np.sin((x + y) / 2 + t)]
    return (127.5 + 100 * np.stack(channels, axis=-1)).astype(np.uint8)


def encode(workload: Workload, folder: Path) -> Contest:
    """Writing the mp4, held to what reads back from it."""
    video, path = Video(picture(workload), 8.0, {}), folder / "clip.mp4"

    def prepare() -> Callable[[], Path]:
        try:
            import av  # noqa: F401
        except ImportError as missing:
            raise MissingLibrary(f"writing mp4 needs the av package ({missing})") from missing
        return lambda: video.save(path)

    def error(written: Path) -> float:
        import av

        with av.open(str(written)) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        if frames.shape != video.frames.shape:
            return float("inf")
        return relative_error(torch.from_numpy(frames).float(), torch.from_numpy(video.frames).float())

    return stage(workload, MP4, {OURS: prepare}, error, MP4_BUDGET)


def contests(workload: Workload, step: Step, steps: int, folder: Path) -> Iterator[tuple[str, Contest]]:
    """Makes the stages one after another."""
    features = ENGINE | ({GRAPH} if workload.device.type == "cuda" else set())
    paths = [step.provider(STEP, features), step.provider(named(STEP, PUBLISHED), frozenset())]
    yield STEP, replace(step.contest("stages", paths), clock=clock(workload))
    yield TEXT, text(workload)
    yield SAMPLER, sampler(workload, steps)
    yield DECODE, decode(workload)
    yield MP4, encode(workload, folder)


@torch.no_grad()
def measure(workload: Workload, step: Step, steps: int, rows: ResultFile, pace: Pace) -> None:
    """Measures every stage, then writes what a video of `steps` steps takes by each path."""
    parts: dict[str, dict[str, Timing]] = {OURS: {}, PUBLISHED: {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, contest in contests(workload, step, steps, Path(folder)):
            timings = hold(contest, rows, pace)
            shared = len(contest.providers) == 1
            for path, found in parts.items():
                provider = named(name, OURS if shared else path)
                if provider in timings:
                    found[name] = timings[provider]
    for path, found in parts.items():
        if STEP in found:
            rows.write(whole(workload, path, steps, found))


def whole(workload: Workload, path: str, steps: int, parts: Mapping[str, Timing]) -> ResultRow:
    """Sums the stages of a path up, each of them named."""
    times = {name: steps if name == STEP else 1 for name in parts}
    sums = {what: sum(times[name] * getattr(part, what) for name, part in parts.items()) for what in ("median", "p20", "p80")}
    seconds = {f"seconds of {name}": times[name] * part.median for name, part in parts.items()}
    case = {"part": "whole", **workload.case, "steps": steps}
    numbers = {**sums, **seconds, "includes": list(parts)}
    return ResultRow("pipeline", case, path, str(workload.dtype)[6:], str(workload.device), OK, numbers=numbers)
