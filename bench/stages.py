"""A video's stages one by one: text, one guided step of the UNet, the sampler around it, decoding, and the mp4."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vstar_engine.config import Sampling
from vstar_engine.errors import MissingLibrary
from vstar_engine.sampling import sample
from vstar_engine.schedule import Schedule
from vstar_engine.text import END, START, TextTower
from vstar_engine.vae import Vae
from vstar_engine.video import Video, to_bytes

from .contest import Contest, Pace, Provider, ceilings, hold
from .ladder import ENGINE, GRAPH, Step
from .rows import OK, Row, Rows
from .scene import ERROR_BUDGET, Scene
from .seeded import relative_error, seeded
from .timing import Timing
from .transformer import WIDER

# five states and the negative prompt
PROMPTS, WORDS = 6, 20
# H.264 at the engine's quality on a smooth picture shows 0.01
MP4_BUDGET = 0.05
TEXT, STEP, SAMPLER, DECODE, MP4 = "text", "UNet step", "sampler", "VAE", "mp4"


def stage(scene: Scene, name: str, prepare: Callable[[], Callable[[], object]], error: Callable, budget: float) -> Contest:
    """Makes a stage a contest of one."""
    case = {"part": "stages", **scene.case}
    return Contest(
        *("pipeline", case, scene.dtype, scene.device, [Provider(name, prepare)]),
        lambda _, answer: error(answer),
        budget,
        ceilings=ceilings(scene.device, scene.dtype),
    )


def text(scene: Scene) -> Contest:
    """The text tower over five states and a negative prompt; making tokens of words is not counted."""
    tokens = torch.zeros(PROMPTS, scene.spec.text.context_length, dtype=torch.int64, device=scene.device)
    tokens[:, : WORDS + 2] = torch.randint(0, START, (PROMPTS, WORDS + 2), device=scene.device)
    tokens[:, 0], tokens[:, WORDS + 1] = START, END
    tower = seeded(lambda: TextTower(scene.spec.text), scene.device, scene.dtype)
    exact = tower.to(WIDER[scene.dtype])(tokens)
    tower = tower.to(scene.dtype)
    error = partial(relative_error, wanted=exact)
    return stage(scene, TEXT, lambda: partial(tower, tokens), error, ERROR_BUDGET[scene.dtype])


def sampler(scene: Scene, steps: int) -> Contest:
    """Everything of `steps` sampling steps but the network: guidance, the update and its noise, in float32."""
    height, width = (side // scene.spec.vae.factor for side in scene.size)
    shape = (1, scene.spec.unet.in_channels, scene.frames, height, width)
    latents, conditional, plain = torch.randn(3, *shape, device=scene.device).unbind()
    tape, schedule = torch.randn(steps, *shape), Schedule.ddim(steps)

    def run(dtype: torch.dtype) -> Tensor:
        def denoise(x: Tensor, timestep: Tensor, index: int) -> tuple[Tensor, Tensor]:
            return conditional.to(dtype), plain.to(dtype)

        *_, last = sample(denoise, schedule, latents.to(dtype), guidance=Sampling.guidance, noise=tape.to(dtype))
        return last[2]

    error = partial(relative_error, wanted=run(torch.float64))
    return stage(scene, SAMPLER, lambda: partial(run, torch.float32), error, ERROR_BUDGET[torch.float32])


def decode(scene: Scene) -> Contest:
    """The autoencoder over the whole clip, and its frames as bytes; the first frame is held to a wider dtype."""
    height, width = (side // scene.spec.vae.factor for side in scene.size)
    shape = (1, scene.spec.unet.in_channels, scene.frames, height, width)
    latents = torch.randn(shape, device=scene.device).to(scene.dtype)
    vae = seeded(lambda: Vae(scene.spec.vae, encoder=False), scene.device, scene.dtype)
    wide = WIDER[scene.dtype]
    exact = vae.to(wide).decode(latents[:, :, :1].to(wide))
    vae = vae.to(scene.dtype)

    def run() -> Tensor:
        pixels = vae.decode(latents)
        to_bytes(pixels[0])
        return pixels

    return stage(scene, DECODE, lambda: run, lambda answer: relative_error(answer[:, :, :1], exact), ERROR_BUDGET[scene.dtype])


def picture(scene: Scene) -> np.ndarray:
    """Draws a smooth, moving picture: (T, H, W, 3) uint8. Noise would be the worst case of any video coder."""
    height, width = scene.size
    t, y, x = np.meshgrid(np.arange(scene.frames) / 8, np.arange(height) / 24, np.arange(width) / 24, indexing="ij")
    channels = [np.sin(x + t), np.sin(y - t), np.sin((x + y) / 2 + t)]
    return (127.5 + 100 * np.stack(channels, axis=-1)).astype(np.uint8)


def encode(scene: Scene, folder: Path) -> Contest:
    """Writing the mp4, held to what reads back from it."""
    video, path = Video(picture(scene), 8.0, {}), folder / "clip.mp4"

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

    return stage(scene, MP4, prepare, error, MP4_BUDGET)


def contests(scene: Scene, step: Step, steps: int, folder: Path) -> Iterator[tuple[str, Contest]]:
    """Makes the stages one after another."""
    features = ENGINE | ({GRAPH} if scene.device.type == "cuda" else set())
    yield STEP, step.contest("stages", [step.provider(STEP, features)])
    yield TEXT, text(scene)
    yield SAMPLER, sampler(scene, steps)
    yield DECODE, decode(scene)
    yield MP4, encode(scene, folder)


@torch.no_grad()
def measure(scene: Scene, step: Step, steps: int, rows: Rows, pace: Pace) -> None:
    """Measures every stage, then writes what a video of `steps` steps takes: their sum, its parts named."""
    parts: dict[str, Timing] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, contest in contests(scene, step, steps, Path(folder)):
            timings = hold(contest, rows, pace)
            if name in timings:
                times = steps if name == STEP else 1
                one = timings[name]
                parts[name] = Timing(times * one.median, times * one.p20, times * one.p80, one.rounds)
    if STEP not in parts:
        return
    sums = {what: sum(getattr(part, what) for part in parts.values()) for what in ("median", "p20", "p80")}
    seconds = {f"seconds of {name}": part.median for name, part in parts.items()}
    case = {"part": "whole", **scene.case, "steps": steps}
    numbers = {**sums, **seconds, "includes": list(parts)}
    rows.write(Row("pipeline", case, "ours", str(scene.dtype)[6:], str(scene.device), OK, numbers=numbers))
