"""Built engines: what they are called, and every way one is refused before a library reads it."""

import json
import os
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from support.denoisers import Watched
from support.engines import FACTS, engine_at, engine_like, identity
from vstar_engine import Engine, Sampling
from vstar_engine.artifacts.built_engine import BuiltEngine, engines, name_of, remove
from vstar_engine.artifacts.files import digest_of
from vstar_engine.backends.inductor import check_room
from vstar_engine.commands.main import build_parser, main
from vstar_engine.errors import EngineError, OutputError
from vstar_engine.weights.checkpoint import Weights

ROOMY = dict.fromkeys(("f_bavail", "f_bfree", "f_blocks", "f_frsize"), 2**20)


@pytest.fixture
def engine(tmp_path):
    return engine_at(tmp_path / "engine")


def test_the_name_says_what_it_is_and_hashes_the_rest():
    name = name_of(identity(frames=[16, 32]))
    assert name.startswith("mini-inductor-float32-f16-32-32x64-")
    for part, value in {
        "weights": "0",
        "sources": "0",
        "device": "cpu",
        "versions": {},
        "options": {"a": 1},
        "batch": 1,
    }.items():
        assert name_of(identity(frames=[16, 32], **{part: value})) != name
    assert name_of(identity(size=None)).startswith("mini-inductor-float32-fany-any-")


def test_a_name_with_many_lengths_is_short_and_still_tells_them_apart():
    many = list(range(1, 400, 3))
    name = name_of(identity(frames=many))
    assert name.startswith("mini-inductor-float32-f1-to-397-32x64-")
    assert name != name_of(identity(frames=[1, *many[2:]]))


def test_an_engine_as_it_was_built_is_opened(engine):
    artifact = BuiltEngine.open(engine)
    assert artifact.identity == identity()
    assert artifact.file("unet.pt2").read_bytes() == bytes(range(256))
    assert artifact.bytes == 256
    artifact.check(**identity())
    artifact.check_clip(512, (32, 64), 2)


def altered(folder):
    (folder / "unet.pt2").write_bytes(bytes(256))


def shortened(folder):
    (folder / "unet.pt2").write_bytes(bytes(range(255)))


def manifest_edited(folder, close=False):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["identity"]["weights"] = "0" * 64
    if close:
        del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def stated(change):
    """Returns what changes a manifest and has it state the sha256 of what it then is."""

    def edit(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["sha256"]
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest_of(manifest)}))

    return edit


FAULTS = {
    "altered": (altered, "unet.pt2 was altered"),
    "shortened": (shortened, "255 bytes where"),
    "gone": (lambda folder: (folder / "unet.pt2").unlink(), "unet.pt2 is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "vstar-engine build"),
    "manifest a folder": (
        lambda folder: [(folder / "manifest.json").unlink(), (folder / "manifest.json").mkdir()],
        "manifest.json cannot be read: Is a directory",
    ),
    "manifest cut": (lambda folder: (folder / "manifest.json").write_text("{"), "not JSON"),
    "manifest edited": (manifest_edited, "manifest.json was altered"),
    "hash taken away": (lambda folder: manifest_edited(folder, close=True), "states no sha256"),
    "weights": (lambda folder: (folder / "manifest.json").write_text('{"kind": "vstar-engine weights"}'), "does not describe"),
    "no files": (lambda folder: (folder / "manifest.json").write_text('{"kind": "vstar-engine engine"}'), "lists no files"),
    "no identity": (
        stated(lambda manifest: manifest.pop("identity")),
        "does not state what an engine's does: identity missing",
    ),
    "no dtype or size": (
        stated(lambda manifest: [manifest["identity"].pop(name) for name in ("dtype", "size")]),
        "identity's dtype, identity's size missing, or of another kind; build the engine again",
    ),
    "frames of text": (stated(lambda manifest: manifest["identity"].update(frames=["16"])), "identity's frames missing, or of"),
    "one side": (stated(lambda manifest: manifest["identity"].update(size=[32])), "identity's size missing, or of"),
    "targets of numbers": (
        stated(lambda manifest: manifest["identity"].update(options={"targets": [80]})),
        "identity's options missing, or of",
    ),
    "loras of numbers": (stated(lambda manifest: manifest.update(loras=[1])), "loras missing, or of"),
    "writable by others": (lambda folder: folder.chmod(0o770), "can be written by other users"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_engines_are_refused(engine, fault, capsys):
    spoil, complaint = FAULTS[fault]
    spoil(engine)
    with pytest.raises(EngineError, match=complaint):
        Engine.load(engine=engine)
    assert main(["generate", "x", "--engine", str(engine)]) == 9
    assert complaint in capsys.readouterr().err


def test_an_engine_of_another_user(engine, monkeypatch):
    if os.getuid() == 0:
        os.chown(engine, 1, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: -1)
    said = rf"belongs to another user, number \d+; an engine is code: .* chown -R -?\d+ {re.escape(str(engine))}"
    with pytest.raises(EngineError, match=said):
        Engine.load(engine=engine)


def test_an_engine_that_is_not_there(tmp_path):
    for name in ("none", "n" * 300):
        with pytest.raises(EngineError, match=r"no engine at .*; build one"):
            Engine.load(engine=tmp_path / name)


@pytest.mark.parametrize(
    ("changed", "complaint", "in_place"),
    [
        ({"weights": "0" * 64}, "built for weights 000000000000, not", True),
        ({"sources": "0" * 64}, "built for sources 000000000000, not", True),
        ({"device": "cpu of another kind"}, "built for device cpu of another kind, not cpu", False),
        ({"versions": {"torch": "2.0.0"}}, r"built with torch 2.0.0 where .* is installed", True),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_stale_engines_are_refused_with_the_command_to_rebuild(tmp_path, changed, complaint, in_place):
    """Another machine's may be good there, so that it stays."""
    folder = engine_at(tmp_path / "engine", **changed)
    with pytest.raises(EngineError, match=complaint) as caught:
        Engine.load(engine=folder)
    command = "vstar-engine build --backend inductor --model mini --size 32x64 --batch 2 --dtype float32 --device cpu"
    assert str(caught.value).endswith(f"{command} --out {folder} --force" if in_place else command)


def test_a_package_that_finds_no_room_to_be_unpacked(engine, tmp_path, monkeypatch, free_disk):
    """PyTorch called the file outdated, and left behind what it had unpacked."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    free_disk(255)
    with pytest.raises(
        OutputError, match=rf"unpacks {engine}/unet.pt2 into {tmp_path}, which has 0 MiB free where it takes 1; "
    ):
        Engine.load(engine=engine)


def test_a_folder_that_no_library_can_be_loaded_from(engine, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_flag=os.ST_NOEXEC, **ROOMY))
    with pytest.raises(EngineError, match=rf"into {tmp_path} .*, which its mount forbids \(noexec\); name another folder"):
        check_room(engine / "unet.pt2")


def test_a_package_of_a_processor_with_other_instructions_is_refused(tmp_path, monkeypatch):
    """Both have AVX512, and one VNNI, which the compiler then takes."""
    has = {"_is_amx_tile_supported": False, "_is_vnni_supported": True}
    for question in has:
        monkeypatch.setattr(torch.cpu, question, lambda question=question: has[question])
    folder = engine_at(tmp_path / "engine")
    has["_is_vnni_supported"] = False
    with pytest.raises(EngineError, match=r"built for device cpu \w+ VNNI, not cpu \w+; rebuild it: vstar"):
        Engine.load(engine=folder)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"model": "videocrafter2"}, "for model mini, not videocrafter2"),
        ({"dtype": "float16"}, "for dtype float32, not float16"),
        ({"backend": "onnxruntime"}, "for back end inductor, not onnxruntime"),
    ],
    ids=str,
)
def test_an_engine_for_something_else_than_asked(engine, asked, complaint):
    with pytest.raises(EngineError, match=complaint):
        Engine.load(engine=engine, **asked)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["--spatial-attention", "nonsense"],
            "attends within frames as it was built to, got spatial attention 'nonsense'; leave",
        ),
        (["--spatial-attention", "xformers", "--no-graphs"], "got spatial attention 'xformers'; leave the option out"),
        (["--no-graphs"], "back end inductor of .*engine records no CUDA graphs to do without; leave out --no-graphs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_change_nothing_in_an_engine_are_refused(engine, words, complaint, capsys):
    assert main(["generate", "x", "--engine", str(engine), *words]) == 2
    assert re.search(complaint, capsys.readouterr().err)
    given = {"spatial_attention": words[1] if len(words) > 1 else "auto", "graphs": "--no-graphs" not in words}
    with pytest.raises(ValueError, match=complaint):
        Engine.load(engine=engine, **given)


def test_a_package_that_torch_cannot_open(engine):
    with pytest.raises(EngineError, match="cannot be opened by PyTorch"):
        Engine.load(engine=engine)


@pytest.mark.parametrize(
    "words",
    [
        ["--lora=style.safetensors:0.5", "--lora=style.safetensors:-1"],
        ["--weights=other.safetensors"],
        ["--weights=other.safetensors", "--lora=style.safetensors"],
        ["--dtype=float16"],
        ["--backend=onnxruntime"],
    ],
    ids=" ".join,
)
def test_the_command_to_rebuild_builds_what_was_asked_for(words, engine, mini_weights, tmp_path, monkeypatch, capsys):
    """It built what was there already, which was refused again; and in its place."""
    monkeypatch.chdir(tmp_path)
    layer = "input_blocks.1.1.proj_in"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)}, "style.safetensors")
    save_file(dict(Weights(mini_weights)), "other.safetensors")
    assert main(["generate", "x", "--no-synopsis", "--engine", str(engine), *words]) == 9
    given = shlex.split(capsys.readouterr().err.partition("rebuild it: ")[2])
    parser, _ = build_parser("build")
    built = parser.parse_args(given[1:])
    wanted = parser.parse_args(["build", "--backend=inductor", "--model=mini", *words])
    names = ("model", "backend", "weights", "lora", "dtype", "out", "force")
    assert [getattr(built, name) for name in names] == [getattr(wanted, name) for name in names]


def test_a_back_end_without_an_engine():
    with pytest.raises(ValueError, match="make one with `vstar-engine build --backend inductor`"):
        Engine.load("mini", backend="inductor")


@pytest.mark.parametrize(
    ("clip", "complaint"),
    [
        ((33, (32, 64), 2), r"at most 32 frames, got 33; .*--frames 16,32,33"),
        ((16, (64, 64), 2), r"is for 32x64, got 64x64; .*--size 64x64"),
        ((16, (32, 64), 3), r"a batch of 2, got 3; .*--no-batch-guidance .*--batch 3"),
        ((16, (32, 64), 10), r"a batch of 2, got 10; use --no-batch-guidance or make fewer videos at once$"),
    ],
    ids=str,
)
def test_clips_that_an_engine_does_not_take(tmp_path, clip, complaint):
    with pytest.raises(EngineError, match=complaint) as caught:
        BuiltEngine.open(engine_at(tmp_path / "engine", frames=[16, 32])).check_clip(*clip)
    assert "--out" not in str(caught.value)


def test_a_size_that_is_free_is_as_large_as_the_plan_takes(tmp_path):
    """It was found out at the first step, after everything was loaded."""
    plan = {"profiles": [{"frames": [1, 16, 16], "height": [4, 12, 16], "width": [4, 16, 16]}]}
    folder = engine_at(tmp_path / "engine", facts={**FACTS, "plan": plan}, frames=[16], size=None)
    artifact = BuiltEngine.open(folder)
    artifact.check_clip(16, (128, 128), 2)
    with pytest.raises(EngineError, match=r"takes sides of at most 128, got 128x160; build one: .*--size 128x160"):
        artifact.check_clip(16, (128, 160), 2)


def test_the_clip_is_checked_before_anything_is_computed(mini, tmp_path):
    artifact = BuiltEngine.open(engine_at(tmp_path / "engine", frames=[4], batch=1))
    bound = engine_like(mini, artifact=artifact, denoiser=Watched(None, lambda *given: None))
    with pytest.raises(EngineError, match="at most 4 frames"):
        bound.generate("snow", frames=5)
    with pytest.raises(EngineError, match="is for 32x64, got 32x32"):
        bound.generate("snow", frames=4, size=(32, 32))
    with pytest.raises(EngineError, match="a batch of 1, got 2"):
        bound.generate("snow", frames=4)
    with pytest.raises(TypeError, match="NoneType"):  # past every check, at the engine's own size
        bound.generate("snow", frames=4, sampling=Sampling(steps=1, batch_guidance=False))


def test_engines_are_listed_and_removed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VSTAR_ENGINES", str(tmp_path))
    for batch in (1, 2):
        engine_at(tmp_path / name_of(identity(batch=batch)), batch=batch)
    shortened(engine_at(tmp_path / "z"))
    (tmp_path / ".half.1.partial").mkdir()
    assert main(["engines"]) == 0
    out = capsys.readouterr().out
    assert out.count("mini-inductor-float32-fany-32x64") == 2
    assert "255 bytes where" in out
    assert f"3 engines in {tmp_path}" in out
    assert main(["engines", "rm", name_of(identity(batch=1)), str(tmp_path / "z")]) == 0
    assert [artifact.identity["batch"] for artifact in engines(tmp_path)] == [2]
    assert BuiltEngine.open(name_of(identity(batch=2))).identity["batch"] == 2
    capsys.readouterr()
    assert main(["engines", "--json"]) == 0
    assert [row["batch"] for row in json.loads(capsys.readouterr().out)] == [2]


def test_only_engines_are_removed(tmp_path, mini_weights):
    for folder in (tmp_path, mini_weights, tmp_path / "none"):
        with pytest.raises(EngineError, match="no engine"):
            remove(folder)
    assert (mini_weights / "manifest.json").is_file()


def test_a_renamed_engine_is_listed_under_the_name_that_removes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VSTAR_ENGINES", str(tmp_path))
    engine_at(tmp_path / "spring")
    assert main(["engines", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert main(["engines", "rm", row["name"]]) == 0
    assert list(engines(tmp_path)) == []


def test_a_link_to_an_engine_is_not_removed(engine, capsys):
    (engine.parent / "link").symlink_to(engine)
    assert main(["engines", "rm", str(engine.parent / "link")]) == 4
    assert "cannot remove" in capsys.readouterr().err
    assert BuiltEngine.open(engine)


def test_the_digest_does_not_depend_on_order():
    assert digest_of({"a": 1, "b": [2, None]}) == digest_of({"b": [2, None], "a": 1}) != digest_of({"a": 1, "b": [None, 2]})
