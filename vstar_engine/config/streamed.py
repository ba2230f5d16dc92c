"""What may be asked of a video that is made chunk by chunk."""

import math
from dataclasses import dataclass

from .models import Spec
from .request import Request

# a length without end, as `--frames inf` says it
ENDLESS = math.inf
# published without the regularisation
TAR_PRESET = "none"


@dataclass(frozen=True)
class StreamedRequest(Request):
    """A video to make in chunks. `frames` is the length of the timeline that its states lie on.

    An `endless` video goes on after the timeline, in its last state.
    """

    most_frames = 1_000_000
    most_at_once = most_frames
    endless: bool = False

    def chunks(self, spec: Spec) -> int:
        """Returns the number of chunks, the first one with them; of an endless video, those of its timeline."""
        assert spec.streaming is not None
        fresh = spec.streaming.chunk - spec.streaming.overlap
        return max(1, -(-(self.frames - spec.streaming.overlap) // fresh))


def frame_count(text: str) -> float:
    """Reads a number of frames, or `inf` as ENDLESS."""
    try:
        return ENDLESS if text == "inf" else int(text)
    except ValueError as error:
        raise ValueError(f"a number of frames is whole, or inf, got {text!r}") from error
