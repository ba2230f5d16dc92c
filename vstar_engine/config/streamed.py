"""What may be asked of a video that is made chunk by chunk."""

from dataclasses import dataclass

from .models import Spec
from .request import Request
from .sampling import Sampling

# a length without end, as `--frames inf` says it
ENDLESS = 0
# the published settings: DDIM 50 steps, guidance 7.5, no regularisation
STEPS, GUIDANCE, TAR_PRESET = 50, 7.5, "none"


@dataclass(frozen=True)
class StreamedRequest(Request):
    """A video to make in chunks. `frames` is the length of the timeline that its states lie on.

    An `endless` video goes on after the timeline, in its last state.
    """

    most_frames = 1_000_000
    endless: bool = False

    def chunks(self, spec: Spec) -> int:
        """Returns the number of chunks, the first one with them; of an endless video, those of its timeline."""
        assert spec.streaming is not None
        fresh = spec.streaming.chunk - spec.streaming.overlap
        return max(1, -(-(self.frames - spec.streaming.overlap) // fresh))


def frame_count(text: str) -> int:
    """Reads a number of frames, or `inf` as ENDLESS."""
    return ENDLESS if text == "inf" else int(text)


def published_sampling() -> Sampling:
    """Returns the published settings of a streaming model's sampling."""
    return Sampling(steps=STEPS, guidance=GUIDANCE)
