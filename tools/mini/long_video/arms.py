"""The ways to make a long video that the study compares, and the videos that it makes."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tools.mini.claims.results import key
from tools.mini.claims.stories import STORIES
from vstar_engine.config.request import Request
from vstar_engine.config.sampling import Sampling, Tar
from vstar_engine.config.windows import AVERAGE, FIFO, FREENOISE, NONE, PAPER, RANDOMIZED, SHARED, SHUFFLED, USUAL, WindowPlan

STEPS, GUIDANCE = 10, 6.0
# the last regularised step, of 10 as 13 of 25
UNTIL = 5
LONG, LONGER = 240, 1200
# what differs from one pass of independent noise, by the arm's name
ARMS: dict[str, dict[str, Any]] = {
    "one pass": {"window": None},
    "randomized": {"blend": RANDOMIZED},
    "average": {"blend": AVERAGE},
    "none": {"blend": NONE},
    "freenoise": {"blend": FREENOISE, "window": 16, "overlap": 12, "noise": SHUFFLED},
    # a partition of ten frames, for ten steps
    "fifo": {"blend": FIFO, "window": STEPS, "overlap": 0},
    "randomized, paper": {"blend": PAPER},
    "randomized, phase": {"blend": RANDOMIZED, "phase": True},
    "randomized, shared": {"blend": RANDOMIZED, "noise": SHARED},
}
FIRST, LONGER_ARMS = tuple(ARMS)[:6], ("randomized", "average", "none", "randomized, shared")


@dataclass(frozen=True)
class Case:
    """One video: an arm, a story and its seed, frames, and whether TAR is on."""

    arm: str
    story: int
    seed: int
    frames: int
    tar: bool

    @property
    def content(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def key(self) -> str:
        return key(self.content)

    @property
    def plan(self) -> WindowPlan:
        """Returns the windows at whose borders an arm is judged, also one that has none there, as a control."""
        return WindowPlan(self.frames, *USUAL)

    @property
    def request(self) -> Request:
        given = {"window": USUAL[0], "overlap": USUAL[1], **ARMS[self.arm]}
        tar = Tar(until_step=UNTIL) if self.tar else None
        sampling = Sampling(steps=STEPS, guidance=GUIDANCE)
        return Request(
            tuple(STORIES[self.story].texts), self.frames, 1000 * self.story + self.seed, None, sampling, tar, **given
        )


def cases() -> Iterator[Case]:
    """All videos, a story after the other: ten stories in 240 frames with and without TAR, two in 1,200 frames."""
    stories = range(0, len(STORIES), 2)
    for story in stories:
        yield from (Case(arm, story, 0, LONG, True) for arm in FIRST)
    for story in stories:
        yield from (Case(arm, story, 0, LONG, False) for arm in FIRST)
    for story in stories:
        yield from (Case(arm, story, 0, LONG, True) for arm in ARMS if arm not in FIRST)
    for story in (0, 2):
        yield from (Case(arm, story, 0, LONGER, True) for arm in LONGER_ARMS)
