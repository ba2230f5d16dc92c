"""Files hold the frames and what made them, appear whole or not at all, and say so when they cannot be written."""

import resource
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vstar_engine.artifacts.files import check_writable, write_aside
from vstar_engine.config.request import Request
from vstar_engine.errors import NotFinite, OutputError
from vstar_engine.video import Video, encoding, read_provenance, to_bytes

PROVENANCE = {"engine": "vstar-engine", "request": {"states": ["ein Fluß 🚀", "lone \ud800", 'a "quote"']}}


# x264 reads uninitialised memory where a side is 48 pixels (valgrind), so that its bytes may differ from run to run;
# at sides of 64 and more it reads none
def made(frames=9, height=64, width=96):
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    clip = np.broadcast_to(ramp[None, None, :, None], (frames, height, width, 3)).copy()
    clip[:, :4] = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 20
    return Video(clip, 8.0, PROVENANCE)


def test_bytes_are_clamped_scaled_and_truncated():
    pixels = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 2.0]).reshape(1, 1, 1, 6).expand(3, -1, -1, -1)
    assert to_bytes(pixels)[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]


def test_mp4_is_h264_and_shows_the_frames(tmp_path):
    video = made()
    with av.open(str(video.save(tmp_path / "a.mp4"))) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.average_rate == 8
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert decoded.shape == video.frames.shape
    assert np.abs(decoded.astype(int) - video.frames.astype(int)).mean() < 4


def test_gif_loops_at_its_rate(tmp_path):
    with Image.open(made().save(tmp_path / "a.gif")) as image:
        assert image.n_frames == 9
        assert image.info["duration"] == 120  # hundredths of a second are all a gif has
        assert image.info["loop"] == 0


@pytest.mark.parametrize(("frames", "shape"), [(64, (2, 4)), (16, (1, 2)), (33, (2, 4)), (1, (1, 1))], ids=str)
def test_contact_sheet_shows_every_eighth_frame(tmp_path, frames, shape):
    video = made(frames)
    sheet = np.asarray(Image.open(video.save(tmp_path / "a.png")))
    height, width = video.frames.shape[1:3]
    rows, columns = shape
    assert sheet.shape == (rows * (height + 4) - 4, columns * (width + 4) - 4, 3)
    for i, frame in enumerate(video.frames[::8]):
        top, left = i // 4 * (height + 4), i % 4 * (width + 4)
        assert (sheet[top : top + height, left : left + width] == frame).all()


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_provenance_survives_the_file(tmp_path, name):
    assert read_provenance(made().save(tmp_path / name)) == PROVENANCE


def test_a_name_that_the_disk_refuses_is_one_sentence(tmp_path):
    with pytest.raises(OutputError, match=r"cannot write .*: File name too long"):
        made().save(tmp_path / f"{'a' * 300}.mp4")
    assert not list(tmp_path.iterdir())


def test_long_prompts_survive_the_file(tmp_path):
    long = {**PROVENANCE, "request": {"states": ["snow " * 20_000]}}
    for name in ("a.mp4", "a.gif", "a.png"):
        assert read_provenance(Video(made().frames, 8.0, long).save(tmp_path / name)) == long


def test_a_file_is_the_same_bytes_when_made_again(tmp_path):
    a, b = made().save(tmp_path / "a.mp4"), made().save(tmp_path / "b.mp4")
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("name", ["a.avi", "a", "a.mp4.txt"])
def test_other_endings_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"ends in \.mp4, \.gif, \.png"):
        made().save(tmp_path / name)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_a_full_disk_leaves_nothing(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (8, 128, 128, 3), dtype=np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OutputError, match=f"cannot write {tmp_path}/{name}: "):
            Video(noise, 8.0, PROVENANCE).save(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def parts(video, size):
    """A video in runs of frames, as a decoder gives them."""
    return [replace(video, frames=video.frames[i : i + size]) for i in range(0, len(video.frames), size)]


def write_along(video, path, size):
    with encoding(path) as along:
        for part in parts(video, size):
            along(part)
        assert not path.exists()


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_file_written_along_is_the_same_bytes(tmp_path, size):
    whole = made().save(tmp_path / "a.mp4")
    write_along(made(), tmp_path / "b.mp4", size)
    assert (tmp_path / "b.mp4").read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize("given", [0, 2])
def test_frames_that_do_not_all_come_leave_the_file_as_it_was(tmp_path, given):
    (tmp_path / "a.mp4").write_text("before")

    def write():
        with encoding(tmp_path / "a.mp4") as along:
            for part in parts(made(), 1)[:given]:
                along(part)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert (tmp_path / "a.mp4").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_full_disk_is_said_when_all_frames_are_there(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (30, 256, 256, 3), dtype=np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OutputError, match=f"cannot write {tmp_path}/a.mp4: "):
            write_along(Video(noise, 8.0, PROVENANCE), tmp_path / "a.mp4", 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        made().save(tmp_path / "no" / "a.mp4")


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_files_of_others_have_no_provenance(tmp_path, name):
    with pytest.raises(ValueError, match="no file"):
        read_provenance(tmp_path / name)
    (tmp_path / name).write_text("hello")
    with pytest.raises(ValueError, match=name):
        read_provenance(tmp_path / name)
    Video(made().frames, 8.0, {"engine": "another"}).save(tmp_path / name)
    with pytest.raises(ValueError, match="no settings of this engine"):
        read_provenance(tmp_path / name)


@pytest.mark.parametrize("name", ["a" * 251 + ".mp4", "\u96ea" * 80 + ".gif", "12:30.mp4", "what?now.png"])
def test_any_name_that_the_disk_takes_is_written_and_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    check_writable(Path(name))
    made(2).save(name)
    assert read_provenance(name) == PROVENANCE
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_name_that_the_disk_cannot_take_is_refused_before_the_work():
    with pytest.raises(OutputError, match="File name too long"):
        check_writable(Path("c" * 300 + ".mp4"))


def test_a_link_is_followed_and_a_device_is_none(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "latest.mp4").symlink_to("disk/real.mp4")
    check_writable(tmp_path / "latest.mp4")
    made(2).save(tmp_path / "latest.mp4")
    assert (tmp_path / "latest.mp4").is_symlink()
    assert read_provenance(tmp_path / "disk" / "real.mp4") == PROVENANCE
    (tmp_path / "full.mp4").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="it is a device or a pipe"):
        check_writable(tmp_path / "full.mp4", force=True)


def test_two_writers_of_one_number_have_names_of_their_own(tmp_path):
    with write_aside(tmp_path / "shared.mp4") as one, write_aside(tmp_path / "shared.mp4") as other:
        assert one != other
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert (tmp_path / "shared.mp4").read_bytes() == b"one"


@pytest.mark.parametrize("fps", [0.001, 0.1, 23.976, 24000 / 1001, 1000.0, np.float32(24)])
def test_mp4_plays_at_the_rate(tmp_path, fps):
    with av.open(str(replace(made(2), fps=fps).save(tmp_path / "a.mp4"))) as held:
        assert float(held.streams.video[0].average_rate) == pytest.approx(fps, rel=0.01)


def test_a_rate_that_no_mp4_holds_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot play at 0.0004 frames a second; give at least 0\.001"):
        replace(made(2), fps=0.0004).save(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"fps must be 0\.001 to 1000, got 0\.0004"):
        Request(("a",), fps=0.0004)


@pytest.mark.parametrize("fps", [12.0, 24.0, 30.0, 60.0, 240.0])
def test_a_gif_lasts_as_long_as_it_should(tmp_path, fps, caplog):
    lasts = []
    with Image.open(replace(made(10), fps=fps).save(tmp_path / "a.gif")) as image:
        for number in range(image.n_frames):
            image.seek(number)
            lasts.append(image.info.get("duration") or 0)
    assert sum(lasts) == pytest.approx(10_000 / fps, abs=5)
    assert ("plays slower in browsers" in caplog.text) == (fps > 50)


# players without regard to tags take BT.709 for large frames
@pytest.mark.parametrize(
    ("height", "width", "matrix", "tag"),
    [
        (64, 96, "ITU601", 6),
        (576, 1024, "ITU601", 6),
        (768, 1280, "ITU709", 1),
        (64, 1280, "ITU709", 1),
        (640, 64, "ITU709", 1),
    ],
)
def test_mp4_says_how_its_colours_were_encoded(height, width, matrix, tag, tmp_path):
    red = Video(np.full((2, height, width, 3), (200, 40, 40), np.uint8), 8.0, PROVENANCE)
    with av.open(str(red.save(tmp_path / "a.mp4"))) as held:
        context, frame = held.streams.video[0].codec_context, next(held.decode(video=0))
        assert (context.colorspace, context.color_range, context.color_primaries, context.color_trc) == (tag, 1, 1, 1)
        shown = [frame.reformat(format="rgb24", src_colorspace=space).to_ndarray()[0, 0] for space in (matrix, None)]
    assert np.abs(np.array(shown).astype(int) - (200, 40, 40)).max() <= 2, "as players guess, and by the tags"


def test_nan_is_no_video():
    pixels = torch.zeros(3, 2, 4, 4)
    pixels[0, 1, 2, 3] = torch.nan
    with pytest.raises(NotFinite, match=r"came out as NaN .*: guidance, TAR's strength or a LoRA's strength is too large"):
        to_bytes(pixels)


def test_numbers_of_numpy_are_written_and_odd_sides_are_refused(tmp_path):
    video = Video(made(2).frames, 8.0, {**PROVENANCE, "request": {"seed": np.int64(3)}})
    assert read_provenance(video.save(tmp_path / "a.mp4"))["request"] == {"seed": 3}
    with pytest.raises(ValueError, match="an mp4 has even sides, got 65x97"):
        Video(np.zeros((2, 65, 97, 3), np.uint8), 8.0, PROVENANCE).save(tmp_path / "b.mp4")


def test_a_picture_that_claims_gigapixels_is_refused(tmp_path):
    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = part(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + part(b"IDAT", zlib.compress(b"\0")) + part(b"IEND", b""))
    with pytest.raises(ValueError, match=r"is no readable image \("):
        read_provenance(tmp_path / "a.png")
