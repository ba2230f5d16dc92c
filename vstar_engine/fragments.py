"""Writes an mp4 that plays while it grows: every run of frames is one fragment, encoded by an encoder of its own."""

import errno
import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import OutputError
from .video import BT601, BT709, CRF, LIMITED, Video, comment_of, frame_rate

# one thread, so that a machine of other cores writes the same bytes; no B-frames, so that times need no edit list
ENCODER = {"crf": str(CRF), "bf": "0", "g": "100000", "sc_threshold": "0", "threads": "1"}
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}


@dataclass(frozen=True)
class Written:
    """How much of a file is whole: its frames, fragments and bytes."""

    frames: int = 0
    fragments: int = 0
    bytes: int = 0


class FragmentedFile:
    """An mp4 that grows by fragments; `written` says what of it is whole, and a new object can go on from there."""

    def __init__(self, path: Path, written: Written | None = None):
        """Starts a new file, or cuts one off behind what was `written` of it; OutputError where that cannot be done."""
        self.path, self.written = path, written or Written()
        try:
            if written is None:
                path.write_bytes(b"")
            elif path.stat().st_size < written.bytes:
                raise OutputError(f"{path} has {path.stat().st_size} bytes where {written.bytes} were written before")
            else:
                os.truncate(path, written.bytes)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error

    def append(self, part: Video) -> Written:
        """Adds frames as one fragment and returns what is whole then; on a full disk the file ends at the last whole one."""
        head, fragment, ticks = encoded(part)
        w = self.written
        added = (b"" if w.frames else head) + renumbered(fragment, w.fragments + 1, w.frames * ticks)
        try:
            with self.path.open("r+b") as file:
                file.seek(w.bytes)
                file.write(added)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            os.truncate(self.path, w.bytes)
            raise OutputError(f"cannot write {self.path}: {os.strerror(error.errno or errno.EIO)}") from error
        self.written = Written(w.frames + len(part.frames), w.fragments + 1, w.bytes + len(added))
        return self.written


def encoded(part: Video) -> tuple[bytes, bytes, int]:
    """Encodes frames (T, H, W, 3) as one closed group; returns a file's head, the fragment, and the ticks of a frame."""
    import av

    _, height, width, _ = part.frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"an mp4 has even sides, got {height}x{width}")
    rate, whole = frame_rate(part.fps), io.BytesIO()
    with av.open(whole, "w", format="mp4", options=FRAGMENTED) as container:
        container.metadata["comment"] = comment_of(part)
        stream = container.add_stream("libx264", rate=rate, options=ENCODER)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        colours = stream.codec_context
        colours.colorspace, colours.color_range = BT601, LIMITED
        colours.color_primaries, colours.color_trc = BT709, BT709
        for frame in part.frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
        assert stream.time_base is not None
        ticks = int(1 / (rate * stream.time_base))
    data = whole.getvalue()
    head = b"".join(data[at : at + size] for kind, at, size in boxes(data) if kind in (b"ftyp", b"moov"))
    fragment = b"".join(data[at : at + size] for kind, at, size in boxes(data) if kind in (b"moof", b"mdat"))
    return head, fragment, ticks


def boxes(data: bytes, at: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """Yields the kind, place and size of each box of an mp4 between two places (ISO/IEC 14496-12)."""
    end = len(data) if end is None else end
    while at < end:
        size, kind = struct.unpack_from(">I4s", data, at)
        yield kind, at, size
        at += size


def renumbered(fragment: bytes, number: int, start: int) -> bytes:
    """Returns a fragment with its number in the file and the time of its first frame, in ticks."""
    out = bytearray(fragment)
    for kind, at, size in boxes(fragment):
        if kind != b"moof":
            continue
        for inner, place, length in boxes(fragment, at + 8, at + size):
            if inner == b"mfhd":
                struct.pack_into(">I", out, place + 12, number)
            if inner == b"traf":
                for leaf, here, _ in boxes(fragment, place + 8, place + length):
                    if leaf == b"tfdt":  # version 1: 64 bits
                        struct.pack_into(">Q", out, here + 12, start)
    return bytes(out)
