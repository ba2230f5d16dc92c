"""What `--fast` saves and costs: the steps of a video, how far its latents stray from the exact run's with the same noise."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from vstar_engine.bench.harness.contest import Pace
from vstar_engine.bench.harness.random_networks import lay_out, relative_error
from vstar_engine.bench.harness.rows import SKIPPED, ResultFile, ResultRow
from vstar_engine.bench.harness.timing import seconds_of, summarise
from vstar_engine.config.request import Request
from vstar_engine.config.sampling import FAST, FEW_STEP, FP8, GUIDANCE_INTERVAL, STEP_CACHE, Sampling, until_step
from vstar_engine.errors import DeviceError
from vstar_engine.loading import load_text, open_weights
from vstar_engine.machine import malloc
from vstar_engine.networks import fp8
from vstar_engine.networks.unet import UNet
from vstar_engine.prompting.embeddings import Encode
from vstar_engine.prompting.interpolation import spread
from vstar_engine.prompting.tokenizer import tokenize
from vstar_engine.sampling import fp8_calibration
from vstar_engine.sampling.batch import Batch, BatchRow
from vstar_engine.sampling.step_cache import StepCache
from vstar_engine.weights import bundled

from .precision_drift import cosine
from .workload import TAR, Workload, sharing, trained_unet

EXACT, BOTH = "exact", f"{GUIDANCE_INTERVAL}, {STEP_CACHE}"
OPTIONS = (EXACT, GUIDANCE_INTERVAL, STEP_CACHE, BOTH, FP8, FEW_STEP)
assert set(FAST) < set(OPTIONS)
STATES = ("a landscape covered in thick snow, bare trees", "melting snow, a pale sun", "a lush green meadow in full spring")
# as the claims on the mini model
GUIDANCE = 6.0


def sampling(option: str, steps: int) -> Sampling:
    """Returns the settings of an option; FP8 is in the network."""
    if option == FEW_STEP:
        return Sampling.few()
    return Sampling(steps, guidance=GUIDANCE, fast=() if option in (EXACT, FP8) else tuple(option.split(", ")))


def encoder(workload: Workload) -> Encode:
    """Encodes by the text tower of a model that comes with weights; makes embeddings up where there is none."""
    spec, where = workload.spec, (workload.device, workload.dtype)
    if workload.model in bundled.BUNDLED:
        tower, _ = load_text(spec, open_weights(spec, None), *where)
        return lambda texts: tower(tokenize(texts).to(workload.device))

    def made_up(texts: Sequence[str]) -> Tensor:
        generator = torch.Generator().manual_seed(len(texts))
        shape = (len(texts), spec.text.context_length, spec.unet.context_dim)
        return torch.randn(shape, generator=generator).to(*where)

    return made_up


@dataclass
class Walk:
    """An option's videos, each of another seed: the latents after every step, in few what each took for the finished.

    `contexts` are the conditional and the unconditional one.
    """

    workload: Workload
    unet: UNet
    contexts: tuple[Tensor, Tensor]
    sampling: Sampling
    runs: list[list[Tensor]] = field(default_factory=list)

    def __call__(self) -> None:
        """Takes the steps of the next seed's video."""
        workload, spec = self.workload, self.workload.spec
        height, width = workload.size
        tar = replace(TAR, until_step=until_step(self.sampling.until, self.sampling.steps))
        request = Request(STATES[:1], workload.frames, len(self.runs), (height, width), self.sampling, tar)
        cache = StepCache(spec.unet) if STEP_CACHE in self.sampling.fast else None
        batch = Batch(self.unet, spec, workload.dtype, [BatchRow.of(0, request, None, *self.contexts, spec)], cache=cache)
        run = []
        for _ in range(batch.steps):
            batch.step()
            row = batch.rows[0]
            latents = row.clean if FEW_STEP in self.sampling.fast else row.latents
            assert latents is not None
            run.append(latents)
        self.runs.append([latents.cpu() for latents in run])

    def against(self, exact: "Walk") -> dict[str, object]:
        """Returns the relative difference after every step, the mean over seeds; in few, from the exact run's last latents.

        The exact run goes first: it has a video more where the time was spent on the way.
        """
        pairs = list(zip(self.runs, exact.runs, strict=False))
        if FEW_STEP in self.sampling.fast:
            pairs = [(ours, theirs[-1:] * len(ours)) for ours, theirs in pairs]
        errors = torch.tensor([[relative_error(a, b) for a, b in zip(*pair, strict=True)] for pair in pairs]).mean(0)
        alike = [cosine(ours[-1], theirs[-1]) for ours, theirs in pairs]
        return {
            "seeds": len(pairs),
            "errors": [round(float(error), 4) for error in errors],
            "last_error": float(errors[-1]),
            "last_cosine": sum(alike) / len(alike),
        }


def walks(workload: Workload, steps: int) -> dict[str, Walk | str]:
    """Returns every option's walk, or why there is none here."""
    if workload.device.type == "cpu":
        malloc.keep_pages()  # as the engine does
    encode, unet = encoder(workload), lay_out(trained_unet(workload.spec, workload.device, workload.dtype), "channels_last")
    contexts = spread(encode(STATES[: workload.frames]), workload.frames)[None], encode([""])[None]
    found: dict[str, Walk | str] = {}
    for option in OPTIONS:
        try:
            taken = small(workload, unet, encode) if option == FP8 else unet
            found[option] = Walk(workload, taken, contexts, sampling(option, steps))
        except DeviceError as error:
            found[option] = str(error)
    return found


def small(workload: Workload, unet: UNet, encode: Encode) -> UNet:
    """Returns a network that multiplies in FP8 and shares all else with another."""
    fp8.check(workload.device, workload.dtype)
    unet = sharing(unet)
    fp8.convert(unet, fp8_calibration.calibrate(unet, workload.spec, encode))
    return unet


def timed(ready: dict[str, Walk], pace: Pace) -> dict[str, list[float]]:
    """Lets the options make a video each in turn, a seed a round, while there is time; returns the seconds that each took."""
    taken: dict[str, list[float]] = {option: [] for option in ready}
    begun = time.monotonic()
    for done in range(pace.warmup + pace.rounds):
        # after a warm one and a timed one no round starts that would end after the limit
        if done > pace.warmup and (time.monotonic() - begun) * (done + 1) / done > pace.limit:
            break
        for option, walk in ready.items():
            if pace.left < max(chain(*taken.values()), default=0.0):
                return taken
            taken[option] += seconds_of(walk)
    return taken


@torch.inference_mode()
def measure(workload: Workload, steps: int, rows: ResultFile, pace: Pace) -> None:
    """Times the options in turn and writes a row for each with its difference from the exact run."""
    weights = "trained" if workload.model in bundled.BUNDLED else "seeded"
    case = {"part": "fast", **workload.case, "steps": steps, "guidance": GUIDANCE, "weights": weights}
    here = (str(workload.dtype)[6:], str(workload.device))
    found = walks(workload, steps)
    ready = {option: walk for option, walk in found.items() if isinstance(walk, Walk)}
    taken = timed(ready, pace)
    for option, walk in found.items():
        words = walk if isinstance(walk, str) else "" if walk.runs else f"{max(pace.left, 0.0):.0f} s were left"
        if isinstance(walk, str) or words:
            rows.write(ResultRow("pipeline", case, option, *here, SKIPPED, words))
            continue
        warm = taken[option][pace.warmup :]
        note = None if warm else "of its first video, which also loads what it runs"
        numbers = {**asdict(summarise(warm or taken[option])), "steps": len(walk.runs[0]), **walk.against(ready[EXACT])}
        rows.write(ResultRow("pipeline", case, option, *here, note=note, numbers=numbers))
