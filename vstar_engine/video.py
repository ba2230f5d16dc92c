"""Writes frames to mp4, gif or png (contact sheet) files that carry the settings that made them."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from vstar_engine.artifacts.files import write_aside

if TYPE_CHECKING:
    from torch import Tensor

CRF = 18
SHEET_EVERY, SHEET_COLUMNS, SHEET_GAP = 8, 4, 4


def to_bytes(pixels: "Tensor") -> np.ndarray:
    """(3, T, H, W) in about [-1, 1] -> (T, H, W, 3) uint8: clamped, scaled to 0..255 and truncated."""
    scaled = (pixels.float().clamp(-1.0, 1.0) + 1.0) / 2.0 * 255.0
    return scaled.byte().permute(1, 2, 3, 0).cpu().numpy()


@dataclass(frozen=True)
class Video:
    """A finished video: frames (T, H, W, 3) uint8, the rate it plays at, what made it, and seconds spent per stage."""

    frames: np.ndarray
    fps: float
    provenance: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Writes an .mp4 (H.264), a .gif or, as .png, a contact sheet of every eighth frame; whole or not at all.

        Raises ValueError for another ending, OutputError if it cannot.
        """
        path = Path(path)
        writer = check_ending(path)
        with write_aside(path) as aside:
            writer(self, aside)
        return path


def _save_mp4(video: Video, path: Path) -> None:
    _encode(iter([video]), path)


def _encode(parts: Iterator[Video], path: Path) -> None:
    """Writes the frames of consecutive videos as one file with the first one's size, rate and settings."""
    import av

    first = next(parts)
    _, height, width, _ = first.frames.shape
    try:
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            container.metadata["comment"] = json.dumps(first.provenance)
            stream = container.add_stream(
                "libx264", rate=Fraction(first.fps).limit_denominator(1001), options={"crf": str(CRF)}
            )
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for frame in chain.from_iterable(part.frames for part in chain([first], parts)):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
    except av.FFmpegError as error:
        raise OSError(error.errno, error.strerror) from error


class Unfinished(Exception):
    """Not all frames of a file that is being written came."""


@contextmanager
def encoding(path: Path) -> Iterator[Callable[[Video], None]]:
    """Encodes an mp4 on its own thread while its frames are made; pass it runs of frames as videos, in order.

    When the block ends the file is complete or absent. Raises OutputError then if it cannot be written.
    """
    parts: SimpleQueue[Video | None] = SimpleQueue()
    complete = Event()

    def given() -> Iterator[Video]:
        yield from iter(parts.get, None)
        if not complete.is_set():
            raise Unfinished

    def write() -> None:
        with write_aside(path) as aside:
            _encode(given(), aside)

    with ThreadPoolExecutor(1, "encoding") as thread:
        written = thread.submit(write)
        try:
            yield parts.put
            complete.set()
        finally:
            parts.put(None)
        written.result()


def _save_gif(video: Video, path: Path) -> None:
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in video.frames)
    comment = json.dumps(video.provenance)
    first.save(path, save_all=True, append_images=rest, duration=1000 / video.fps, loop=0, comment=comment.encode())


def contact_sheet(frames: np.ndarray, every: int = SHEET_EVERY, columns: int = SHEET_COLUMNS) -> np.ndarray:
    """Lays every `every`-th of (T, H, W, 3) uint8 frames out in rows on white: (rows, cells, 3) uint8."""
    taken = frames[::every]
    columns = min(columns, len(taken))
    rows, (height, width) = -(-len(taken) // columns), frames.shape[1:3]
    sheet = np.full((rows * (height + SHEET_GAP) - SHEET_GAP, columns * (width + SHEET_GAP) - SHEET_GAP, 3), 255, np.uint8)
    for i, frame in enumerate(taken):
        top, left = i // columns * (height + SHEET_GAP), i % columns * (width + SHEET_GAP)
        sheet[top : top + height, left : left + width] = frame
    return sheet


def _save_png(video: Video, path: Path) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("comment", json.dumps(video.provenance))
    Image.fromarray(contact_sheet(video.frames)).save(path, pnginfo=info)


WRITERS = {".mp4": _save_mp4, ".gif": _save_gif, ".png": _save_png}


def check_ending(path: Path) -> Any:
    """Returns the writer for a file name's ending; ValueError for an unknown one."""
    if path.suffix.lower() not in WRITERS:
        raise ValueError(f"a video file ends in {', '.join(WRITERS)}, got {path.name!r}")
    return WRITERS[path.suffix.lower()]


def read_provenance(path: str | Path) -> dict[str, Any]:
    """Reads back the settings that made a file; ValueError when it is no video of this engine."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file at {path}")
    try:
        comment = _mp4_comment(path) if path.suffix.lower() == ".mp4" else _image_comment(path)
        provenance = json.loads(comment)
    except ValueError as error:
        raise ValueError(f"{path} carries no settings of this engine") from error
    if not isinstance(provenance, dict) or provenance.get("engine") != "vstar-engine":
        raise ValueError(f"{path} carries no settings of this engine")
    return provenance


def _mp4_comment(path: Path) -> str:
    import av

    try:
        with av.open(str(path)) as container:
            return container.metadata.get("comment", "")
    except av.FFmpegError as error:
        raise ValueError(f"{path} is no readable video ({error.strerror})") from error


def _image_comment(path: Path) -> str:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            comment = image.info.get("comment", "")
            return comment.decode() if isinstance(comment, bytes) else comment
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no readable image") from error
