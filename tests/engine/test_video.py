"""Files hold the frames and what made them, appear whole or not at all, and say so when they cannot be written."""

import resource
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vstar_engine.errors import OutputError
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
    noise = np.random.default_rng(0).integers(0, 256, (30, 256, 256, 3), dtype=np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
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
