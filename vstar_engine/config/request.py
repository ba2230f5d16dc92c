"""Settings as frozen dataclasses, each default once, and the tables of models and TAR presets."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .models import Spec
from .sampling import Sampling, Tar
from .timeline import SPREAD_MODES, Position, place

MAX_FRAMES = 512


@dataclass(frozen=True)
class Request:
    """One video to make: everything that decides its frames, and the rate its file plays at.

    `size` is (height, width) in pixels, None for the model's own. `mode` is how states spread over frames (`text.spread`), `at`
    or `durations` where (`timeline.place`), both empty for evenly. `negatives`, one a state, take the place of `negative`.
    """

    states: tuple[str, ...]
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

    def __post_init__(self) -> None:
        if not 1 <= self.frames <= MAX_FRAMES:
            raise ValueError(f"frames must be 1 to {MAX_FRAMES}, got {self.frames}")
        if not self.states:
            raise ValueError("there are no states to show; give a prompt or at least one state")
        if len(self.states) > self.frames:
            raise ValueError(f"{len(self.states)} states need at least {len(self.states)} frames, got {self.frames}")
        if not 0 <= self.seed < 2**32:  # PyTorch's CPU generator reads no more bits
            raise ValueError(f"a seed is a whole number from 0 to {2**32 - 1}, got {self.seed}")
        if self.mode not in SPREAD_MODES:
            raise ValueError(f"mode must be one of {', '.join(SPREAD_MODES)}, got {self.mode!r}")
        if not 0.001 <= self.fps <= 1000:  # what an mp4 holds
            raise ValueError(f"fps must be 0.001 to 1000, got {self.fps}")
        if self.negatives and len(self.negatives) != len(self.states):
            raise ValueError(
                f"there are {len(self.negatives)} negative prompts for {len(self.states)} states; give one for each"
            )
        if self.negatives and self.negative:
            raise ValueError("give one negative prompt for the whole video or one for each state, not both")
        self.anchors()

    def anchors(self) -> list[int]:
        """Returns the frame each state sits at; ValueError where its position or duration makes no sense."""
        return place(len(self.states), self.frames, self.mode, self.at, self.durations)

    def fitted(self, spec: Spec) -> "Request":
        """Returns the request with its size filled in; ValueError when `spec` has no such size or TAR level."""
        size = self.size or spec.size
        spec.check_size(*size)
        if self.tar is not None:
            self.tar.check_levels(spec.unet.levels)
        return replace(self, size=size)


def rows_at_once(requests: Sequence[Request]) -> int:
    """Counts the rows of the largest call of the network, when requests are denoised together."""
    guided = sum(request.sampling.guidance != 1.0 for request in requests)
    return len(requests) + (guided if all(request.sampling.batch_guidance for request in requests) else 0)
