"""Reads the frames of a video file."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def frames_in(path: Path) -> Iterator[tuple[np.ndarray, float]]:
    """Yields every frame, (H, W, 3) uint8, with the file's frame rate; ValueError for a file that is no readable video."""
    import av

    if not path.is_file():
        raise ValueError(f"no video at {path}")
    try:
        # absolute: FFmpeg takes what stands before a colon for a protocol
        with av.open(str(path.absolute())) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video")
            rate = float(container.streams.video[0].average_rate or 0)
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24"), rate
    except av.FFmpegError as error:
        raise ValueError(f"{path} is no readable video ({error.strerror})") from error


def last_frames(path: Path, size: tuple[int, int], count: int) -> tuple[np.ndarray, int]:
    """Reads the last frames of a video, (count, H, W, 3) uint8, and how many it has.

    Frames of another size are scaled to cover it and cut at the centre. ValueError as for `frames_in`, and for a shorter video.
    """
    from PIL import Image, ImageOps

    kept: deque[np.ndarray] = deque(maxlen=count)
    every = 0
    for frame, _ in frames_in(path):
        kept.append(frame)
        every += 1
    if every < count:
        raise ValueError(f"a video to go on from has at least {count} frames, and {path} has {every}")
    fitted = [
        frame
        if frame.shape[:2] == size
        else np.asarray(ImageOps.fit(Image.fromarray(frame), size[::-1], Image.Resampling.BICUBIC))
        for frame in kept
    ]
    return np.stack(fitted), every


def whole_video(path: Path) -> tuple[np.ndarray, float]:
    """Reads a video: frames (T, H, W, 3) uint8, and frames a second. ValueError as for `frames_in`."""
    read = list(frames_in(path))
    if not read:
        raise ValueError(f"{path} holds no frames")
    return np.stack([frame for frame, _ in read]), read[0][1]
