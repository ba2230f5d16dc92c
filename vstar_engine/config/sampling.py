"""How a video is sampled: steps, guidance, lossy options, and temporal attention regularization."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .checked_values import real, whole

TRAINING_STEPS = 1000
# what takes the latents from one step to the next; the first is the published one
DDIM, DPM, DPM_SDE, UNIPC = SAMPLERS = ("ddim", "dpm++2m", "dpm++2m-sde", "unipc")
# which timesteps are taken: the published ones from 1 up, or those that end at the noisiest, 999
LEADING, TRAILING = SPACINGS = ("leading", "trailing")
# frames whose squares float64 divides by
LEAST_SIGMA, MOST_SIGMA = 1e-6, 1e6


@dataclass(frozen=True)
class Tar:
    """Temporal attention regularisation (TAR, arXiv 2403.13501, eq. 3-4).

    `sigma` is the width of the Gaussian in frames, by UNet level; level 0 is the finest. A smaller sigma means more motion.
    `strength` scales the Gaussian. TAR is on in the steps 0 to `until_step`, -1 for none. Raises ValueError for a level below
    0, a sigma outside 1e-6 to 1e6, or a strength that is not finite.
    """

    sigma: Mapping[int, float] = field(default_factory=lambda: {0: 1.0, 1: 8.0})
    strength: float = 1.0
    until_step: int = 13

    def __post_init__(self) -> None:
        sigmas = {level: real("sigma", sigma) for level, sigma in self.sigma.items()}
        object.__setattr__(self, "sigma", sigmas)
        object.__setattr__(self, "strength", real("TAR strength", self.strength))
        object.__setattr__(self, "until_step", whole("the last step with TAR", self.until_step))
        for level, sigma in sigmas.items():
            if isinstance(level, bool) or not isinstance(level, int) or level < 0:
                raise ValueError(f"a TAR level is a whole number from 0 up, got {level!r}")
            if not (math.isfinite(sigma) and sigma > 0):
                raise ValueError(f"sigma is a finite number of frames above 0, got {sigma} for level {level}")
            if not LEAST_SIGMA <= sigma <= MOST_SIGMA:
                raise ValueError(f"sigma is {LEAST_SIGMA:g} to {MOST_SIGMA:g} frames, got {sigma} for level {level}")
        if not math.isfinite(self.strength):
            raise ValueError(f"TAR strength must be a finite number, got {self.strength}")

    def check_levels(self, levels: int) -> None:
        """Raises ValueError when a level is named that a UNet of `levels` levels does not have."""
        for level in self.sigma:
            if level >= levels:
                raise ValueError(f"TAR level {level} does not exist: this network has levels 0 to {levels - 1}")


# lossy options: names for `Sampling.fast`, and FP8, which is set when a network is loaded
GUIDANCE_INTERVAL, STEP_CACHE, FEW_STEP, FP8 = "guidance-interval", "step-cache", "few-step", "fp8"


FAST = {
    GUIDANCE_INTERVAL: "guidance in the first three fifths of the steps only",
    STEP_CACHE: "the deep UNet levels run in every second step only",
    FEW_STEP: "4 steps without guidance, for weights with a consistency LoRA",
    FP8: "linear layers and convolutions in FP8, on GPUs that have it",
}


# of ten, how many steps are guided
GUIDED_TENTHS = 6


# one step in so many runs the whole network
WHOLE_EVERY = 2


# a consistency model's steps are some of those that its teacher took
CONSISTENCY_STEPS = 50


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampler and classifier-free guidance (arXiv 2207.12598); the defaults are the published ones.

    `sampler` is one of SAMPLERS: DDIM (2010.02502), DPM-Solver++ 2M and its stochastic form (2211.01095), UniPC (2302.04867);
    `spacing` is one of SPACINGS. `steps` is 1 to 1000. `eta`, 0 to 1, scales the noise that a step of DDIM adds. `guidance`
    weights the conditional branch; 1 disables guidance. `fps_condition` is the frame rate that conditions the network, not the
    one of the file. `batch_guidance` runs both guidance branches in one batch instead of two passes. `fast` names lossy options
    of `FAST`. Raises ValueError for a value out of range or options that do not combine.
    """

    steps: int = 25
    eta: float = 1.0
    guidance: float = 12.0
    fps_condition: int = 28
    batch_guidance: bool = True
    fast: tuple[str, ...] = ()
    sampler: str = DDIM
    spacing: str = LEADING

    def __post_init__(self) -> None:
        for name in ("steps", "fps_condition"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        for name in ("eta", "guidance"):
            object.__setattr__(self, name, real(name, getattr(self, name)))
        if not 1 <= self.steps <= TRAINING_STEPS:
            raise ValueError(f"steps must be 1 to {TRAINING_STEPS}, got {self.steps}")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta must be 0 to 1, got {self.eta}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, got {self.guidance}")
        if self.fps_condition < 1:
            raise ValueError(f"the fps condition must be at least 1, got {self.fps_condition}")
        if isinstance(self.fast, str):
            raise ValueError(f"fast must be a tuple of names, such as ({self.fast!r},), got the string {self.fast!r}")
        unknown = [repr(name) for name in self.fast if name not in FAST]
        if unknown:
            raise ValueError(f"fast must name some of {', '.join(FAST)}, got {', '.join(unknown)}")
        if FP8 in self.fast:
            raise ValueError(f"{FP8} is a way to load the network, not to sample with it: Engine.load(fp8=True)")
        if GUIDANCE_INTERVAL in self.fast and self.guidance == 1.0:
            raise ValueError(f"{GUIDANCE_INTERVAL} does not compose with guidance 1, which has no guidance to leave out")
        for name, known in (("sampler", SAMPLERS), ("spacing", SPACINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.sampler != DDIM and self.eta != 1.0:
            raise ValueError(f"eta is a setting of {DDIM}, and {self.sampler} has none: leave it out, got {self.eta}")
        if FEW_STEP in self.fast:
            self._check_few()

    def _check_few(self) -> None:
        if self.steps > CONSISTENCY_STEPS:
            raise ValueError(f"{FEW_STEP} takes 1 to {CONSISTENCY_STEPS} steps, got {self.steps}")
        if self.eta != 1.0:
            raise ValueError(f"{FEW_STEP} draws fresh noise for every step, which is eta 1, got {self.eta}")
        if self.sampler != DDIM or self.spacing != LEADING:
            own = f"{FEW_STEP} has a sampler and timesteps of its own"
            raise ValueError(f"{own}: leave both out, got sampler {self.sampler} and spacing {self.spacing}")
        if STEP_CACHE in self.fast:
            raise ValueError(f"{STEP_CACHE} does not compose with {FEW_STEP}: its steps are too far apart")

    @staticmethod
    def few(**given: Any) -> "Sampling":
        """Returns the settings of few-step sampling, 4 steps without guidance, with the given ones on top."""
        fast = tuple(dict.fromkeys((FEW_STEP, *given.pop("fast", ()))))
        return Sampling(**{"steps": 4, "guidance": 1.0, **given, "fast": fast})

    @staticmethod
    def usual(fast: tuple[str, ...] = (), own: Iterable[tuple[str, Any]] = ()) -> "Sampling":
        """Returns the default settings with `fast`, and with a model's `own` defaults where it takes many steps."""
        return Sampling.few(fast=fast) if FEW_STEP in fast else Sampling(**dict(own), fast=fast)

    @property
    def until(self) -> str:
        """Returns TAR's default last step: the published step, or the published share of another number of steps."""
        return str(Tar.until_step) if self.steps == Sampling.steps else f"{(Tar.until_step + 1) / Sampling.steps:.0%}"

    def guided(self, index: int) -> bool:
        """Returns whether a step, counted from 0, runs the unconditional branch too."""
        within = GUIDANCE_INTERVAL not in self.fast or 10 * index < GUIDED_TENTHS * self.steps
        return self.guidance != 1.0 and within

    def whole(self, index: int) -> bool:
        """Returns whether a step, counted from 0, runs the whole network."""
        return STEP_CACHE not in self.fast or index % WHOLE_EVERY == 0

    @property
    def walk(self) -> tuple[str, ...]:
        """Returns the options of `fast` that change the network calls of a step; a batch shares them."""
        return tuple(name for name in (STEP_CACHE, FEW_STEP) if name in self.fast)


TAR_PRESETS: dict[str, Tar | None] = {
    "none": None,
    "64D1": Tar({0: 1.0}),
    "64D4": Tar({0: 4.0}),
    "64D8": Tar({0: 8.0}),
    "64D1_32D1": Tar({0: 1.0, 1: 1.0}),
    "64D1_32D8": Tar({0: 1.0, 1: 8.0}),
    "64D1_32D12": Tar({0: 1.0, 1: 12.0}),
    "64D4_32D8": Tar({0: 4.0, 1: 8.0}),
    "64D4_32D12": Tar({0: 4.0, 1: 12.0}),
}


def parse_sigma(text: str) -> tuple[int, float]:
    """Reads LEVEL=VALUE."""
    level, _, sigma = text.partition("=")
    try:
        return int(level), float(sigma)
    except ValueError as error:
        raise ValueError(f"a sigma is LEVEL=VALUE, such as 0=1.5, got {text!r}") from error


def until_step(until: int | str, steps: int = 1) -> int:
    """Returns TAR's last step, counted from 0, from a step (13) or a share of the steps (56%)."""
    try:
        if isinstance(until, int) or not until.endswith("%"):
            return int(until)
        share = float(until[:-1]) / 100
    except ValueError as error:
        raise ValueError(f"until is a step such as 13 or a share of the steps such as 56%, got {until!r}") from error
    if not 0 <= share <= 1:
        raise ValueError(f"until, as a share of the steps, is 0% to 100%, got {until}")
    return round(share * steps) - 1


def tar_named(name: str) -> Tar | None:
    """Looks a TAR preset up by name, in capitals or not; ValueError lists the known ones."""
    presets = {preset.lower(): tar for preset, tar in TAR_PRESETS.items()}
    if name.strip().lower() not in presets:
        raise ValueError(f"unknown TAR preset {name!r}; known presets: {', '.join(TAR_PRESETS)}")
    return presets[name.strip().lower()]


def tar_of(preset: str, sigma: Mapping[int, float], until: int | str, steps: int, **others: float) -> Tar | None:
    """Returns a preset with single settings on top of it, `others` by their names; None where no level has a sigma."""
    named = tar_named(preset)
    sigma = {**(named.sigma if named else {}), **sigma}
    return Tar(sigma, until_step=until_step(until, steps), **others) if sigma else None
