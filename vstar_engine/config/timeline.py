"""Places states on frames, by positions or durations (video synopsis prompting)."""

import math
import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

SPREAD_MODES = ("linear", "ease", "hold")

# a frame number, a share of the clip, or a time such as "12s"
Position = int | float | str
TIME = re.compile(r"(\d+(?:\.\d+)?)s")
# JavaScript writes the share 1.0 as 1
FRAME_1 = "a position of 1 is the second frame, 1.0 or '100%' the last one"


def parse_position(text: str) -> Position:
    """Reads `12` as a frame, `0.5` and `50%` as shares of the clip, `12s` as a time."""
    if TIME.fullmatch(text):
        return text
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError as error:
        raise ValueError(
            f"a position is a frame such as 12, a share such as 0.5 or 50%, or a time such as 12s, got {text!r}"
        ) from error


def anchor_frames(anchors: int, frames: int) -> list[int]:
    """Returns the frame each anchor sits at: trunc(linspace(0, frames-1, anchors)), counted from the nearer end."""
    if anchors == 1:
        return [0]
    step = (frames - 1) / (anchors - 1)
    return [int(step * i) if i < anchors // 2 else int((frames - 1) - step * (anchors - 1 - i)) for i in range(anchors)]


def check_anchors(where: Sequence[int], count: int, frames: int, mode: str) -> None:
    """Raises ValueError unless `where` names a frame for each of `count` anchors, ascending from 0.

    The last must be the clip's last frame, except where `mode` is hold or there is a single anchor.
    """
    ascending = len(where) == count and all(a < b for a, b in pairwise(where))
    loose = mode == "hold" or count == 1
    if not ascending or where[0] != 0 or not 0 <= where[-1] < frames or not (loose or where[-1] == frames - 1):
        last = f"to at most {frames - 1}" if loose else f"to {frames - 1}"
        raise ValueError(f"the {count} anchors' frames must ascend from 0 {last} ({mode}), got {list(where)}")


def place(
    count: int,
    frames: int,
    mode: str = "linear",
    at: Sequence[Position] = (),
    durations: Sequence[float] = (),
    fps: float = 8.0,
) -> list[int]:
    """Returns the frame each of `count` states sits at: evenly spread, or by its position, or by durations.

    A position is a frame (int), a share of the clip (float) or a time (text such as "12s") at `fps`; the clip's end is its last
    frame. Durations are relative. In mode hold a duration is how long a
    state stays; else it is the distance to the next state, and the last one may be left out.
    Raises ValueError for a wrong number of them, or places that `check_anchors` refuses.
    """
    if at and durations:
        raise ValueError("give the states' positions or their durations, not both")
    if at:
        if len(at) != count:
            raise ValueError(f"there are {len(at)} positions for {count} states; give one for each")
        where = [_frame(position, frames, fps) for position in at]
    elif durations:
        where = _along(count, frames, mode, durations)
    else:
        where = anchor_frames(count, frames)
    try:
        check_anchors(where, count, frames, mode)
    except ValueError as error:
        raise ValueError(f"{error}; {FRAME_1}" if ends_at_frame_1(at, frames) else str(error)) from error
    return where


def ends_at_frame_1(at: Sequence[Position], frames: int) -> bool:
    """Returns whether the last position is the frame 1, though more frames follow."""
    return bool(at) and isinstance(at[-1], int) and at[-1] == 1 and frames > 2


def _frame(position: Position, frames: int, fps: float) -> int:
    if isinstance(position, str):
        time = TIME.fullmatch(position)
        if time is None:
            raise ValueError(f"a time is a number of seconds such as 12s, got {position!r}")
        frame = round(float(time[1]) * fps)
        if frame > frames:
            raise ValueError(f"{position} is behind the end of a video of {frames} frames at {fps:g} fps, {frames / fps:g} s")
        return min(frame, frames - 1)
    if isinstance(position, int):
        return position
    if not 0.0 <= position <= 1.0:
        raise ValueError(f"a position, as a share of the clip, must be 0 to 1, got {position}")
    return round(position * (frames - 1))


def _along(count: int, frames: int, mode: str, durations: Sequence[float]) -> list[int]:
    wanted = (count,) if mode == "hold" else (count - 1, count)
    if len(durations) not in wanted:
        raise ValueError(f"there are {len(durations)} durations for {count} states; give {' or '.join(map(str, wanted))}")
    for duration in durations:
        if not (math.isfinite(duration) and duration > 0):
            raise ValueError(f"a duration is a finite number above 0, got {duration}")
    if count == 1:
        return [0]
    if mode == "hold":
        ends, whole = list(accumulate(durations)), frames
    else:
        ends, whole = list(accumulate(durations[: count - 1])), frames - 1
    where = [0, *(round(end / ends[-1] * whole) for end in ends)][:count]
    if any(a >= b for a, b in pairwise(where)) or where[-1] >= frames:
        raise ValueError(f"{frames} frames are too few for the durations {list(durations)}: states would fall on one frame")
    return where
