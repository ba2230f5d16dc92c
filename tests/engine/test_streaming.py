"""Videos made chunk by chunk: what each chunk hears, that a killed run goes on to the same bytes, and that memory stays."""

import json

import av
import numpy as np
import pytest
import torch

from support.streaming import SPEC, tiny_weights
from vstar_engine import Engine, Sampling, Tar
from vstar_engine.commands.main import main
from vstar_engine.config.models import MODELS
from vstar_engine.config.streamed import StreamedRequest
from vstar_engine.errors import CheckpointError
from vstar_engine.fragments import FragmentedFile, boxes
from vstar_engine.prompting.interpolation import spread, spread_at
from vstar_engine.streaming import Stream, StreamState
from vstar_engine.video import Video, read_provenance

STEPS = Sampling(steps=2, guidance=3.0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, SPEC.name, SPEC)
        yield tiny_weights(tmp_path_factory.mktemp("streaming"))


@pytest.fixture(scope="module")
def engine(weights):
    return Engine.load(SPEC.name, weights)


@pytest.fixture
def start():
    return np.random.default_rng(4).integers(0, 256, (16, *SPEC.size, 3), dtype=np.uint8)


def request(*states, frames=40, **given):
    return StreamedRequest(states or ("a lake",), frames, sampling=STEPS, tar=None, **given)


def made(engine, wanted, start, **given):
    return np.concatenate([part.frames for part in Stream(engine, wanted, start, **given)])


def test_chunks_join_and_the_last_is_cut(engine, start):
    parts = [len(part.frames) for part in Stream(engine, request(frames=35), start)]
    assert parts == [16, 8, 8, 3]
    whole = made(engine, request(frames=40), start)
    assert np.array_equal(whole[:16], start)
    assert np.array_equal(whole[:35], made(engine, request(frames=35), start))
    assert not np.array_equal(whole, made(engine, request(frames=40, seed=1), start))


def test_a_chunk_hears_its_own_part_of_the_timeline(engine, start):
    """The conditional attention module's 8 frames are the first of the 16; one state is one row."""
    stream = Stream(engine, request("day", "night", frames=40), start)
    every = spread(stream.cond, 40)
    for chunk in (0, 2, 4):
        wanted = every[[min(frame, 39) for frame in range(8 * chunk, 8 * chunk + 16)]]
        assert torch.equal(stream.texts(chunk)[0][0], wanted)
    assert stream.texts(2)[1].shape[:2] == (1, 1)
    assert Stream(engine, request(), start).texts(3)[0].shape[:2] == (1, 1)
    both = made(engine, request("day", "night", frames=24), start), made(engine, request("day", frames=24), start)
    assert not np.array_equal(*both)


@pytest.mark.parametrize("mode", ["linear", "ease", "hold"])
def test_rows_of_a_timeline_are_those_of_the_whole(mode):
    anchors, where = torch.randn(3, 5, 4), [0, 4, 10]
    assert torch.equal(spread_at(anchors, where, range(11), mode), spread(anchors, 11, mode, where))


def test_tar_regularises_a_chunk(engine, start):
    plain, regularised = request(frames=24), StreamedRequest(("a lake",), 24, sampling=STEPS, tar=Tar({0: 2.0}, until_step=1))
    assert not np.array_equal(made(engine, plain, start), made(engine, regularised, start))


def test_a_state_is_enough_to_go_on(engine, start, tmp_path):
    stream = Stream(engine, request(), start)
    whole = [part.frames for part in stream]
    stopped = Stream(engine, request(), start)
    for _ in zip(range(2), stopped, strict=False):
        pass
    stopped.state.save(tmp_path / "state", {"said": 1})
    state, about = StreamState.read(tmp_path / "state")
    assert about == {"said": 1}
    rest = [part.frames for part in Stream(engine, request(), state=state)]
    assert np.array_equal(np.concatenate(whole[2:]), np.concatenate(rest))


def test_an_engine_of_a_streaming_model_refuses_whole_videos(engine):
    with pytest.raises(ValueError, match="in chunks"):
        engine.generate("a lake")
    with pytest.raises(CheckpointError, match="leave them out"):
        engine.adapt(["style.safetensors"])
    with pytest.raises(ValueError, match="eager PyTorch alone"):
        Engine.load(SPEC.name, engine.path, fp8=True)


def decoded(path):
    with av.open(str(path)) as file:
        frames = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
    return [time for time, _ in frames], np.stack([frame for _, frame in frames])


def test_fragments_play_while_the_file_grows(tmp_path):
    """Every fragment starts with a frame of its own, and times go on."""
    frames = np.zeros((24, 32, 48, 3), np.uint8) + np.arange(24, dtype=np.uint8)[:, None, None, None] * 10
    file = FragmentedFile(tmp_path / "a.mp4")
    for part in np.split(frames, [16]):
        file.append(Video(part, 8.0, {"engine": "vstar-engine"}))
        times, seen = decoded(tmp_path / "a.mp4")
        assert times == [i / 8 for i in range(file.written.frames)]
        assert np.abs(seen.astype(int) - frames[: len(seen)]).max() <= 4
    kinds = [kind for kind, *_ in boxes((tmp_path / "a.mp4").read_bytes())]
    assert kinds == [b"ftyp", b"moov", b"moof", b"mdat", b"moof", b"mdat"]
    assert read_provenance(tmp_path / "a.mp4")["engine"] == "vstar-engine"


def command(weights, out, *more, frames="40"):
    words = ["generate", "a lake", "--no-synopsis", "--model", SPEC.name, "--weights", str(weights), "--out", str(out)]
    return main([*words, "--frames", frames, "--steps", "2", *more])


@pytest.fixture
def video(tmp_path, start):
    return Video(start, 8.0, {}).save(tmp_path / "start.mp4")


def test_a_killed_run_goes_on_to_the_same_bytes(weights, video, tmp_path, monkeypatch, capsys):
    assert command(weights, tmp_path / "whole.mp4", "--start", str(video), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["frames"] == 40
    assert said["first_chunk"]["frames"] == 16
    assert not (tmp_path / "whole.mp4.resume").exists()
    append, count = FragmentedFile.append, iter(range(9))

    def killed(file, part):
        if next(count) == 2:
            with file.path.open("ab") as torn:
                torn.write(b"half a fragment")
            raise SystemExit("killed")
        return append(file, part)

    monkeypatch.setattr(FragmentedFile, "append", killed)
    with pytest.raises(SystemExit):
        command(weights, tmp_path / "again.mp4", "--start", str(video))
    monkeypatch.undo()
    assert command(weights, tmp_path / "again.mp4", "--resume", "--seed", "5") == 2
    assert "other settings" in capsys.readouterr().err
    assert command(weights, tmp_path / "again.mp4", "--resume") == 0
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_ctrl_c_ends_a_video_without_end(weights, video, tmp_path, monkeypatch, capsys):
    append = FragmentedFile.append

    def pressed(file, part):
        if file.written.fragments == 3:
            raise KeyboardInterrupt
        return append(file, part)

    monkeypatch.setattr(FragmentedFile, "append", pressed)
    assert command(weights, tmp_path / "a.mp4", "--start", str(video), frames="inf") == 0
    assert len(decoded(tmp_path / "a.mp4")[1]) == 32
    assert read_provenance(tmp_path / "a.mp4")["request"]["endless"]


def test_a_full_disk_ends_it_at_the_last_whole_fragment(weights, video, tmp_path, monkeypatch, capsys):
    import os

    count, sync = iter(range(9)), os.fsync

    def full(number):
        if next(count) == 2:
            raise OSError(28, "No space left on device")
        sync(number)

    monkeypatch.setattr("vstar_engine.fragments.os.fsync", full)
    assert command(weights, tmp_path / "a.mp4", "--start", str(video)) == 4
    assert "No space left" in capsys.readouterr().err
    assert len(decoded(tmp_path / "a.mp4")[1]) == 24


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "give --start VIDEO, or a model that makes them"),
        (["--first-model", SPEC.name], "needs a first chunk itself"),
        (["--start", "nowhere.mp4"], "no video at nowhere.mp4"),
        (["--first-model", "mini", "--gif"], "takes no --gif"),
        (["--first-model", "mini"], "multiples of 32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(weights, tmp_path, more, said, capsys):
    assert command(weights, tmp_path / "a.mp4", *more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "a.mp4").exists()


def test_other_models_take_no_options_of_streaming(capsys):
    assert main(["generate", "a lake", "--model", "mini", "--frames", "inf"]) == 2
    assert "for a streaming model" in capsys.readouterr().err
    assert main(["generate", "a lake", "--model", "mini", "--start", "a.mp4"]) == 2
    assert "--start is for a streaming model" in capsys.readouterr().err


def test_the_first_chunk_by_another_model(weights, tmp_path, capsys):
    more = ["--first-model", "mini", "--size", "64x64", "--json"]
    assert command(weights, tmp_path / "a.mp4", *more, frames="20") == 0
    assert json.loads(capsys.readouterr().out)["first_chunk"]["model"] == "mini"
    assert decoded(tmp_path / "a.mp4")[1].shape == (20, 64, 64, 3)
