"""What may be asked of a video: a `Clip` without states, a `Request` with them; both check their values."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Protocol, Self

from .checked_values import real, sides, text, texts, whole
from .models import Spec
from .sampling import DDIM, STEP_CACHE, Sampling, Tar
from .timeline import SPREAD_MODES, Position, parse_position, place
from .windows import FIFO, INDEPENDENT, LONGEST, MAX_FRAMES, RANDOMIZED, USUAL, WindowPlan, check_guide, check_windows, too_long


class Description(Protocol):
    """States with their places and negative prompts, such as `prompting.synopsis.Synopsis`."""

    @property
    def states(self) -> tuple[str, ...]: ...
    @property
    def at(self) -> tuple[Position, ...]: ...
    @property
    def durations(self) -> tuple[float, ...]: ...
    def unwanted(self, negative: str) -> tuple[str, tuple[str, ...]]: ...


def _position(value: Any) -> Position:
    """Returns a position, a whole number, a share or a time, as Python's own."""
    if isinstance(value, str):
        return parse_position(value)
    return (
        real("a position", value) if isinstance(value, float) or not hasattr(value, "__index__") else whole("a position", value)
    )


@dataclass(frozen=True)
class Clip:
    """All settings of a video except its states.

    `frames` is 1 to 10000, more than 512 in windows alone; `seed` is 0 to 2**32 - 1. `size` is (height, width) in pixels, None
    for the model's own. `mode` sets how states are interpolated over the frames (`prompting.interpolation.spread`). `at` places
    the states at frames (int) or shares of the clip (float), `durations` by relative lengths (`timeline.place`); without either
    they are evenly spaced. `negatives`, one a state, replace `negative`. `fps` is the frame rate of the file, 0.001 to 1000.
    `window` makes a clip of more frames in windows (`windows.WindowPlan`), which share `overlap` frames, merged by `blend`, in
    places that `phase` moves from step to step. `noise` says how the initial noise of frames is related; for "shared",
    `noise_share` is the variance that all frames have in common. `guide` names frames that every window attends to.
    Raises ValueError for a value out of range or of another type.
    """

    # without types these are no fields: the longest that a kind of video may be, and the most frames in one call
    most_frames = LONGEST
    most_at_once = MAX_FRAMES

    frames: int = 64
    seed: int = 0
    size: tuple[int, int] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    tar: Tar | None = field(default_factory=Tar)
    negative: str = ""
    mode: str = "linear"
    fps: float = 8.0
    at: tuple[Position, ...] = ()
    durations: tuple[float, ...] = ()
    negatives: tuple[str, ...] = ()
    window: int | None = None
    overlap: int = USUAL[1]
    blend: str = RANDOMIZED
    phase: bool = False
    noise: str = INDEPENDENT
    noise_share: float = 0.2
    guide: str = ""

    def __post_init__(self) -> None:
        self._settle(frames=whole("frames", self.frames), seed=whole("a seed", self.seed), fps=real("fps", self.fps))
        self._settle(size=None if self.size is None else sides(self.size), at=tuple(map(_position, self.at)))
        self._settle(negative=text("negative", self.negative), negatives=texts("negatives", self.negatives))
        self._settle(durations=tuple(real("a duration", value) for value in self.durations))
        self._settle(overlap=whole("overlap", self.overlap), noise_share=real("noise_share", self.noise_share))
        self._settle(window=None if self.window is None else whole("window", self.window))
        if not 1 <= self.frames <= self.most_frames:
            raise ValueError(f"frames must be 1 to {self.most_frames}, got {self.frames}")
        check_windows(self.window, self.overlap, self.blend, self.noise, self.noise_share)
        check_guide(self.frames, self.window, self.blend, self.guide)
        if self.pass_frames > self.most_at_once:
            raise ValueError(too_long(self.frames))
        if self.plan is not None and self.blend == FIFO:
            self._check_queue(self.plan.window)
        if self.plan is not None and STEP_CACHE in self.sampling.fast:
            raise ValueError(f"{STEP_CACHE} keeps features of one pass, so it does not compose with windows")
        if not 0 <= self.seed < 2**32:  # PyTorch's CPU generator reads no more bits
            raise ValueError(f"a seed is a whole number from 0 to {2**32 - 1}, got {self.seed}")
        if self.mode not in SPREAD_MODES:
            raise ValueError(f"mode must be one of {', '.join(SPREAD_MODES)}, got {self.mode!r}")
        if not 0.001 <= self.fps <= 1000:  # what an mp4 holds
            raise ValueError(f"fps must be 0.001 to 1000, got {self.fps}")
        if self.negatives and self.negative:
            raise ValueError("give one negative prompt for the whole video or one for each state, not both")

    def _check_queue(self, window: int) -> None:
        """Raises ValueError for settings that a queue does not take."""
        if self.sampling.fast or self.sampling.sampler != DDIM:
            raise ValueError(f"blend {FIFO} takes every step of {DDIM}, without `fast`, got {self.sampling.sampler}")
        if self.sampling.steps % window:
            raise ValueError(
                f"blend {FIFO} queues a frame for each step, in partitions of a window: give a multiple of {window} steps, "
                f"got {self.sampling.steps}"
            )

    def _settle(self, **values: Any) -> None:
        """Puts values as they were checked in the place of those given."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @cached_property
    def plan(self) -> WindowPlan | None:
        """Returns the windows of the clip; None where one pass makes it."""
        if self.window is None or self.window >= self.frames:
            return None
        return WindowPlan(self.frames, self.window, self.overlap, self.blend, self.phase, self.guide)

    @property
    def pass_frames(self) -> int:
        """Returns the frames of one call of the network."""
        return self.frames if self.plan is None or self.plan.one_pass else self.plan.window

    def fitted(self, spec: Spec) -> Self:
        """Returns the clip with its size filled in; ValueError when the model has no such size or TAR level."""
        size = self.size or spec.size
        spec.check_size(*size)
        if self.tar is not None:
            self.tar.check_levels(spec.unet.levels)
        return replace(self, size=size)

    def places(self, count: int) -> list[int]:
        """Returns the frame each of `count` states sits at; ValueError where this clip cannot show so many."""
        if count > self.frames:
            raise ValueError(f"{count} states need at least {count} frames, got {self.frames}")
        if self.negatives and len(self.negatives) != count:
            raise ValueError(f"there are {len(self.negatives)} negative prompts for {count} states; give one for each")
        return place(count, self.frames, self.mode, self.at, self.durations, self.fps)

    def showing(self, description: Description) -> "Request":
        """Returns the request of this clip and states; the clip's places and negative prompts override theirs."""
        given = {one.name: getattr(self, one.name) for one in fields(Clip)}
        if not self.at and not self.durations:
            given |= {"at": description.at, "durations": description.durations}
        if not self.negatives:
            given["negative"], given["negatives"] = description.unwanted(self.negative)
        return Request(description.states, **given)


@dataclass(frozen=True)
class _States:
    states: tuple[str, ...]


@dataclass(frozen=True)
class Request(Clip, _States):
    """One video to make: a clip, and the states it shows as its first field.

    Raises ValueError without a state, for more states than frames, and for states whose places do not fit the clip.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._settle(states=texts("states", self.states))
        if not self.states:
            raise ValueError("there are no states to show; give a prompt or at least one state")
        _ = self.anchors

    @cached_property
    def anchors(self) -> list[int]:
        """Returns the frame that each state sits at."""
        return self.places(len(self.states))


def rows_at_once(clips: Sequence[Clip]) -> int:
    """Returns the batch size of the largest network call when clips are denoised together."""
    guided = sum(clip.sampling.guidance != 1.0 for clip in clips)
    return len(clips) + (guided if all(clip.sampling.batch_guidance for clip in clips) else 0)
