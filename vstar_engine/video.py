"""Writes frames to mp4, gif or png (contact sheet) files that carry the settings that made them."""

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from vstar_engine.artifacts.files import write_aside

from .errors import NotFinite

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from torch import Tensor

CRF = 18
# rates that a container's fraction holds to 1 %
LONGEST_DENOMINATOR, RATE_ERROR = 1001, 0.01
FASTEST_GIF = 50.0  # browsers show a hundredth of a second as a tenth
# what an mp4 states, in H.273's numbers; BT.709's primaries are sRGB's
BT709, BT601, LIMITED = 1, 6, 1
# FFmpeg's names of the matrices
MATRICES = {BT709: "ITU709", BT601: "ITU601"}
# players without regard to tags take BT.709's matrix for frames larger than PAL's, BT.601's for others
TALLEST_SD, WIDEST_SD = 576, 1279
SHEET_EVERY, SHEET_COLUMNS, SHEET_GAP = 8, 4, 4


def to_bytes(pixels: "Tensor") -> np.ndarray:
    """(3, T, H, W) in about [-1, 1] -> (T, H, W, 3) uint8: clamped, scaled to 0..255 and truncated; NotFinite for NaN."""
    if pixels.isnan().any():
        raise NotFinite(
            "the video came out as NaN (not a number): guidance, TAR's strength or a LoRA's strength is too large for the "
            "network, or float16 overflowed; lower them, or compute in bfloat16 or float32"
        )
    scaled = (pixels.float().clamp(-1.0, 1.0) + 1.0) / 2.0 * 255.0
    return scaled.byte().permute(1, 2, 3, 0).cpu().numpy()


@dataclass(frozen=True)
class Video:
    """A finished video.

    `frames` is (T, H, W, 3) uint8 RGB, `fps` the frames a second at which it plays. `provenance` holds the settings that made
    it, `seconds` the time of each stage: text, denoise, decode.
    """

    frames: np.ndarray
    fps: float
    provenance: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Writes an .mp4 (H.264, 4:2:0), a .gif or, as .png, a contact sheet of every eighth frame; returns the path.

        The file carries `provenance`. It is complete or absent. An mp4 is in BT.709 with more than 576 rows or 1279 columns,
        else in BT.601, and says so. Raises ValueError for another ending, and for a rate or sides that an mp4 cannot have,
        OutputError where the file cannot be written.
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
    if height % 2 or width % 2:
        raise ValueError(f"an mp4 has even sides, got {height}x{width}; save a .gif or .png, or crop it")
    rate = frame_rate(first.fps)
    try:
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            container.metadata["comment"] = comment_of(first)
            stream = container.add_stream("libx264", rate=rate, options={"crf": str(CRF)})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            matrix, colours = colour_matrix(height, width), stream.codec_context
            colours.colorspace, colours.color_range = matrix, LIMITED
            colours.color_primaries, colours.color_trc = BT709, BT709
            for frame in chain.from_iterable(part.frames for part in chain([first], parts)):
                rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
                container.mux(stream.encode(rgb.reformat(format="yuv420p", dst_colorspace=MATRICES[matrix])))
            container.mux(stream.encode(None))
    except av.FFmpegError as error:
        raise OSError(error.errno, error.strerror) from error


def colour_matrix(height: int, width: int) -> int:
    """Returns the matrix that makes YUV of RGB, BT709 or BT601: the one that players guess for a size."""
    return BT709 if height > TALLEST_SD or width > WIDEST_SD else BT601


def frame_rate(fps: float) -> Fraction:
    """Returns the fraction that an mp4 states; ValueError where none that it holds is near."""
    rate = Fraction(float(fps)).limit_denominator(LONGEST_DENOMINATOR)
    if not abs(rate - Fraction(float(fps))) <= RATE_ERROR * float(fps):
        raise ValueError(f"an mp4 cannot play at {fps:g} frames a second; give at least 0.001")
    return rate


def comment_of(video: Video) -> str:
    """Returns what made a video as JSON; numbers may be numpy's."""
    return json.dumps(video.provenance, default=lambda value: value.item() if isinstance(value, np.generic) else str(value))


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
    if video.fps > FASTEST_GIF:
        log.warning(
            "a gif of %g frames a second plays slower in browsers, which keep to %g; save an mp4", video.fps, FASTEST_GIF
        )
    # hundredths of a second are all that a gif holds: spread, so that the whole lasts as long as it should
    ends = [round(100 * i / float(video.fps)) for i in range(len(video.frames) + 1)]
    lasts = [10 * (end - begin) for begin, end in pairwise(ends)]
    first.save(path, save_all=True, append_images=rest, duration=lasts, loop=0, comment=comment_of(video).encode())


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
    info.add_itxt("comment", comment_of(video))
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
    comment = _mp4_comment(path) if path.suffix.lower() == ".mp4" else _image_comment(path)
    try:
        provenance = json.loads(comment)
    except ValueError as error:
        raise ValueError(f"{path} carries no settings of this engine") from error
    if not isinstance(provenance, dict) or provenance.get("engine") != "vstar-engine":
        raise ValueError(f"{path} carries no settings of this engine")
    return provenance


def _mp4_comment(path: Path) -> str:
    import av

    try:
        # absolute: FFmpeg takes what stands before a colon for a protocol
        with av.open(str(path.absolute())) as container:
            return container.metadata.get("comment", "")
    except av.FFmpegError as error:
        raise ValueError(f"{path} is no readable video ({error.strerror})") from error


def _image_comment(path: Path) -> str:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            comment = image.info.get("comment", "")
            return comment.decode(errors="replace") if isinstance(comment, bytes) else str(comment)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no readable image") from error
    except (Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} is no readable image ({error})") from error
