"""The windows of a long clip: where each begins, how they are merged, and what they cost."""

import re
from dataclasses import dataclass
from itertools import pairwise

# frames that the network takes in one pass, and those of a clip in windows
MAX_FRAMES, LONGEST = 512, 10_000
# the window that TAR's presets are for, and its overlap
USUAL = 64, 16
# how windows are merged on the frames that they share: RANDOMIZED and PAPER cut at a random place, by the rule of
# StreamingT2V's code and by that of its paper (arXiv 2403.14773, section 4.3)
# AVERAGE weighs frames by their distance from the window's ends; with NONE the later window is taken. FREENOISE is one pass
# whose temporal attention has windows (arXiv 2310.15169); FIFO is a queue of frames at rising noise levels, in partitions of a
# window each (arXiv 2405.11473)
RANDOMIZED, PAPER, AVERAGE, NONE, FREENOISE = "randomized", "randomized-paper", "average", "none", "freenoise"
FIFO = "fifo"
BLENDS = (RANDOMIZED, PAPER, AVERAGE, NONE, FREENOISE, FIFO)
# initial noise: INDEPENDENT frames; SHUFFLED repeats of the first window (FreeNoise, arXiv 2310.15169); SHARED has a part
# that all frames have in common
INDEPENDENT, SHUFFLED, SHARED = "independent", "freenoise", "shared"
NOISES = (INDEPENDENT, SHUFFLED, SHARED)
# guide keys: K and V of so many frames of the first window, or of every so-manyth frame of the clip
FIRST, EVERY = "first", "every"
# cost beyond which one pass is advised
DEAR = 1.5


@dataclass(frozen=True)
class WindowPlan:
    """Windows of `window` frames over a longer clip; each shares at least `overlap` frames with the one before.

    `phase` moves the inner windows in each step, so that no frame is always at a border. `guide` is "first:N" or "every:N":
    all windows attend to these frames too.
    """

    frames: int
    window: int
    overlap: int
    blend: str = RANDOMIZED
    phase: bool = False
    guide: str = ""

    @property
    def guides(self) -> tuple[str, list[int]]:
        """Returns how guide frames are chosen and which they are; FIRST ones are of the first window."""
        how, _, number = self.guide.partition(":")
        if not number:
            return "", []
        return how, list(range(int(number))) if how == FIRST else list(range(0, self.frames, int(number)))

    @property
    def count(self) -> int:
        """Returns the number of windows: ceil((N - W) / (W - O)) + 1."""
        return -(-(self.frames - self.window) // (self.window - self.overlap)) + 1

    @property
    def starts(self) -> list[int]:
        """Returns the first frame of each window: evenly spread, the last window ends with the clip."""
        last, gaps = self.frames - self.window, max(1, self.count - 1)
        return [(2 * i * last + gaps) // (2 * gaps) for i in range(self.count)]

    @property
    def most_shift(self) -> int:
        """Returns how far the inner windows may move: half the overlap, and not beyond the first or the last window."""
        starts = self.starts
        return min([self.overlap // 2, *(b - a - 1 for a, b in pairwise(starts))])

    def shifted(self, offset: int) -> list[int]:
        """Returns `starts` with the inner ones moved by `offset` frames, at most `most_shift`."""
        starts = self.starts
        return [*starts[:1], *(start + offset for start in starts[1:-1]), *starts[1:][-1:]]

    @property
    def borders(self) -> list[int]:
        """Returns the frames at which windows may change: border t lies between frames t-1 and t."""
        starts = self.starts
        ends = [start + self.window for start in starts]
        return sorted({t for end, start in zip(ends, starts[1:], strict=False) for t in range(start, end + 1)} - {self.frames})

    @property
    def one_pass(self) -> bool:
        """Returns whether the network takes all frames at once."""
        return self.blend == FREENOISE

    @property
    def computed(self) -> int:
        """Returns the frames that the network computes in a step."""
        return self.frames if self.one_pass or self.blend == FIFO else self.count * self.window

    @property
    def cost(self) -> float:
        """Returns the frames that the network computes over those of the clip."""
        return self.computed / self.frames

    @property
    def described(self) -> str:
        """Returns a sentence about the windows and their cost, and advises one pass where that does much less work."""
        said = (
            f"{self.count} windows of {self.window} frames, merged by {self.blend}: {self.cost:.2f} times the work of one pass"
        )
        dear = self.cost > DEAR and self.frames <= MAX_FRAMES
        return f"{said}; one pass is advised (leave out --window)" if dear else said


def check_guide(frames: int, window: int | None, blend: str, guide: str) -> None:
    """Raises ValueError for guide keys that are spelled wrong, or more than a window holds."""
    if not guide:
        return
    if not re.fullmatch(rf"({FIRST}|{EVERY}):[1-9][0-9]{{0,4}}", guide):
        raise ValueError(f"guide keys are {FIRST}:N, of the first window, or {EVERY}:N, of each Nth frame, got {guide!r}")
    if window is None or blend in (FREENOISE, FIFO):
        raise ValueError("guide keys are for clips in windows, which hear those of others; give --window, or no --guide")
    _, chosen = WindowPlan(frames, window, 0, guide=guide).guides
    if len(chosen) > window:
        raise ValueError(f"guide {guide!r} is {len(chosen)} frames, at most a window's {window}")


def check_windows(window: int | None, overlap: int, blend: str, noise: str, share: float) -> None:
    """Raises ValueError, saying what would do, for windows that cannot be."""
    if window is not None and not 1 <= window <= MAX_FRAMES:
        raise ValueError(f"a window must have 1 to {MAX_FRAMES} frames, got {window}")
    if overlap < 0 or (window is not None and overlap >= window):
        raise ValueError(f"the overlap must be 0 to {(window or MAX_FRAMES) - 1} frames, below the window, got {overlap}")
    if blend not in BLENDS:
        raise ValueError(f"blend must be one of {', '.join(BLENDS)}, got {blend!r}")
    if noise not in NOISES:
        raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")
    if noise == SHUFFLED and window is None:
        raise ValueError(f"noise {SHUFFLED!r} repeats that of the first window, so it needs --window")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"the shared part of the noise is 0 to 1, got {share}")


def too_long(frames: int) -> str:
    """Returns the sentence about a clip that is too long for one pass."""
    usual = WindowPlan(frames, *USUAL)
    return (
        f"one pass takes at most {MAX_FRAMES} frames, got {frames}; make the clip of windows: --window {usual.window} "
        f"--overlap {usual.overlap} ({usual.cost:.2f} times the work of one pass)"
    )
