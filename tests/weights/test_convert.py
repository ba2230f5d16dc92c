"""Conversion reads what the official world has, runs no code from it, and leaves a whole folder or nothing."""

import json
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vstar_engine import Engine
from vstar_engine.commands.main import main
from vstar_engine.config.models import MODELS
from vstar_engine.errors import CheckpointError, OutputError
from vstar_engine.weights import random_checkpoint
from vstar_engine.weights.checkpoint import Weights, load, parameter
from vstar_engine.weights.convert import SHARD_BYTES, convert
from vstar_engine.weights.convert_child import convert_here, read_official, write_shards
from vstar_engine.weights.pickle_file import read_pickle

KEY = "model.diffusion_model.out.0.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "model.ckpt"
    random_checkpoint.write(MODELS["mini"], path, seed=7)
    return path


@pytest.fixture(scope="module")
def tensors(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def nothing_left(folder):
    return [path.name for path in folder.iterdir() if path.name != "in.ckpt"] == []


def wrapped(tensors, how):
    if how == "module":
        return {"module": {"_forward_module." + name: value for name, value in tensors.items()}}
    if how == "module, bare":
        return {"module": tensors}
    if how == "parallel":
        return {"state_dict": {f"module.{name}": value for name, value in tensors.items()}}
    if how == "compiled":
        return {name.replace("diffusion_model.", "diffusion_model._orig_mod."): value for name, value in tensors.items()}
    if how == "a pipeline's":
        return {"model": {f"pipe.{name}": value for name, value in tensors.items()}}
    if how == "an average beside":
        return {"state_dict": {**tensors, "model_ema.decay": torch.tensor(0.9), "model_ema.out0weight": tensors[KEY]}}
    if how == "numpy and paths beside":
        return {"state_dict": tensors, "callbacks": {"best": np.float64(0.5)}, "hyper_parameters": {"dir": Path("/data")}}
    if how == "lightning":
        return {"epoch": 3, "global_step": 5, "state_dict": tensors, "lr_schedulers": [], "loops": {"a": 1}}
    return tensors


@pytest.mark.parametrize("how", ["lightning", "module"])
def test_a_wrapped_checkpoint_is_converted(tensors, tmp_path, how):
    torch.save(wrapped(tensors, how), tmp_path / "in.ckpt")
    convert(tmp_path / "in.ckpt", tmp_path / "out", "mini")
    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensors[name]) for name in tensors)


WRAPPED = ("bare", "module, bare", "parallel", "compiled", "a pipeline's", "an average beside", "numpy and paths beside")


@pytest.mark.parametrize("how", WRAPPED)
def test_every_wrapper_gives_the_same_names(tensors, tmp_path, how, caplog):
    torch.save(wrapped(tensors, how), tmp_path / "in.ckpt")
    found = read_official(tmp_path / "in.ckpt")
    assert set(found) == set(tensors)
    assert torch.equal(found[KEY], tensors[KEY])
    assert ("moving average" in caplog.text) == (how == "an average beside")


def test_old_style_pickles_and_safetensors_are_read(tensors, tmp_path):
    torch.save(tensors, tmp_path / "in.ckpt", _use_new_zipfile_serialization=False)
    convert(tmp_path / "in.ckpt", tmp_path / "a", "mini")
    save_file(tensors, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "b", "mini")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["m.safetensors", "m.SAFETENSORS", "m", "m.pth"])
@pytest.mark.parametrize("archived", [True, False], ids=["archive", "old"])
def test_a_pickle_is_read_by_any_name(tmp_path, name, archived):
    """This PyTorch's `torch.load` takes what ends in .safetensors for that format."""
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / name, _use_new_zipfile_serialization=archived)
    assert read_official(tmp_path / name)["a"].tolist() == [1, 1]


def test_shards_and_dtype_and_manifest(checkpoint, tmp_path):
    out = convert(checkpoint, tmp_path / "out", "mini", "bfloat16", shard_bytes=4 * 2**20)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"] == "mini"
    assert manifest["dtype"] == "bfloat16"
    assert manifest["source"]["bytes"] == checkpoint.stat().st_size
    names = [entry["name"] for entry in manifest["files"]]
    assert len(names) > 4
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "manifest.json"])
    largest = max(max(t.nbytes for t in load_file(out / name).values()) for name in names)
    assert all((out / name).stat().st_size <= max(4 * 2**20, largest) + 2**17 for name in names)
    loaded = Engine.load("mini", out, dtype="bfloat16")
    assert loaded.denoiser.out[2].weight.dtype == torch.bfloat16


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("code-was-run"),)


def damaged(tensors, fault, path):
    if fault == "missing":
        torch.save({name: value for name, value in tensors.items() if name != KEY}, path)
    elif fault == "unknown":
        torch.save({**tensors, "control_model.decay": torch.ones(1)}, path)
    elif fault == "misshapen":
        torch.save({**tensors, KEY: torch.ones(3)}, path)
    elif fault == "nan":
        torch.save({**tensors, KEY: torch.full_like(tensors[KEY], torch.nan)}, path)
    elif fault == "code":
        torch.save({"state_dict": tensors, "callbacks": Hostile()}, path)
    elif fault == "code, old style":
        path.write_bytes(pickle.dumps(Hostile()))
    elif fault == "truncated":
        torch.save(tensors, path)
        path.write_bytes(path.read_bytes()[:-100_000])
    elif fault == "truncated, old style":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:-100_000])
    elif fault == "html":
        path.write_text("\n<!DOCTYPE html><html><title>Sign in</title></html>")
    elif fault == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n")
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "list":
        torch.save([1, 2], path)
    elif fault == "no tensors":
        torch.save({"a": 1}, path)
    elif fault == "noise":
        path.write_bytes(bytes(range(256)) * 40)


FAULTS = {
    "missing": f"1 tensors are missing.*{KEY}",
    "unknown": "unknown.*control_model.decay",
    "misshapen": rf"{KEY} is \(3,\), wanted \(32,\)",
    "nan": f"{KEY} holds NaN",
    "code": "never executed",
    "code, old style": "never executed",
    "truncated": "cut short",
    "truncated, old style": "damaged or cut short",
    "html": "web page",
    "pointer": "Git LFS pointer",
    "empty": "empty",
    "list": "no state dict but list",
    "no tensors": "no tensors, such as a",
    "noise": "in.ckpt",
    "absent": "no checkpoint at",
}


# found in whole files by what they hold; the child that says so takes four seconds, and says the others' sentences as well
INSIDE = ("unknown", "misshapen", "nan", "list", "no tensors")


@pytest.mark.parametrize("fault", INSIDE)
def test_what_is_wrong_inside_is_one_sentence(tensors, tmp_path, fault):
    damaged(tensors, fault, tmp_path / "in.ckpt")
    with pytest.raises(CheckpointError, match=FAULTS[fault]) as caught:
        convert_here(tmp_path / "in.ckpt", tmp_path, "mini", "float16", SHARD_BYTES, tell=lambda **said: None, about={})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", [pytest.param(fault, marks=[pytest.mark.slow] * (fault in INSIDE)) for fault in FAULTS])
def test_bad_files_get_one_sentence_and_leave_nothing(tensors, tmp_path, monkeypatch, capsys, fault):
    monkeypatch.chdir(tmp_path)
    damaged(tensors, fault, tmp_path / "in.ckpt")
    assert main(["convert", "in.ckpt", "out", "--model", "mini"]) == 3
    sentence = capsys.readouterr().err.strip()
    assert "\n" not in sentence
    assert re.search(FAULTS[fault], sentence), sentence
    assert nothing_left(tmp_path)


def test_float16_overflow_is_refused(tensors, tmp_path):
    torch.save({**tensors, KEY: torch.full((32,), 1e6)}, tmp_path / "in.ckpt")
    with pytest.raises(CheckpointError, match=r"infinite values in torch\.float16"):
        convert(tmp_path / "in.ckpt", tmp_path / "out", "mini")


def test_another_noise_schedule_is_noticed(tensors, tmp_path, caplog):
    torch.save({**tensors, "alphas_cumprod": tensors["alphas_cumprod"] * 0.9}, tmp_path / "in.ckpt")
    convert(tmp_path / "in.ckpt", tmp_path / "out", "mini")
    assert "alphas_cumprod differs" in caplog.text


def test_a_reader_that_takes_too_much_memory_is_stopped(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="MiB should do"):
        convert(checkpoint, tmp_path / "out", "mini", memory_limit=40 * 2**20)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(checkpoint, tmp_path):
    code = "import resource, sys, vstar_engine.commands.main as cli; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))"
    words = ["convert", str(checkpoint), "out", "--model", "mini"]
    run = [sys.executable, "-c", f"{code}; sys.exit(cli.main({words!r}))"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 4
    assert "cannot write model.safetensors" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_else_the_child_prints_is_no_answer(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('Welcome to the cluster', end='')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reports = []
    convert(checkpoint, tmp_path / "out", "mini", on_progress=lambda done, total: reports.append((done, total)))
    assert reports[-1][0] == reports[-1][1]
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    torch.save([1], tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match="no state dict but list"):
        convert(tmp_path / "bad.ckpt", tmp_path / "out", "mini", force=True)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_zeros_inside_an_archive_are_found_by_its_sums(tmp_path):
    path = tmp_path / "in.ckpt"
    torch.save({"w": torch.ones(4096)}, path)
    with zipfile.ZipFile(path) as archive:
        (entry,) = [entry for entry in archive.infolist() if entry.filename.endswith("data/0")]
    with path.open("r+b") as file:
        file.seek(entry.header_offset + 4096)
        file.write(bytes(1024))
    with pytest.raises(CheckpointError, match="the bytes of in/data/0 do not have the CRC-32 that the archive states"):
        read_pickle(path)


def test_an_archive_without_sums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(4)}, tmp_path / "in.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_pickle(tmp_path / "in.ckpt")["w"], torch.ones(4))


def test_random_checkpoints_are_whole_archives(checkpoint):
    with zipfile.ZipFile(checkpoint) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_narrow_numbers_get_one_verdict_from_both_doors(tmp_path, dtype):
    save_file({"w": torch.ones(3, 3).to(dtype)}, tmp_path / "in.safetensors")
    said = f"w is in {dtype}; save it in float16"
    with pytest.raises(CheckpointError, match=said):
        list(write_shards(read_official(tmp_path / "in.safetensors"), tmp_path, torch.float16, 2**20))
    with pytest.raises(CheckpointError, match=said):
        parameter(Weights(tmp_path / "in.safetensors"), "", "w", (3, 3), torch.float32)
    layer = torch.nn.Linear(3, 3, bias=False)
    layer.register_parameter("w", layer.weight)
    del layer.weight
    with pytest.raises(CheckpointError, match=said):
        load(layer, tmp_path / "in.safetensors")


def test_an_existing_folder_is_kept_unless_forced(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00001.safetensors").write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        convert(checkpoint, tmp_path / "out", "mini")
    with pytest.raises(CheckpointError):
        convert(tmp_path / "nothing", tmp_path / "out", "mini", force=True)
    assert (tmp_path / "out" / "model-00001.safetensors").read_text() == "mine"
    convert(checkpoint, tmp_path / "out", "mini", force=True)
    assert not (tmp_path / "out" / "model-00001.safetensors").exists()


def test_force_replaces_nothing_but_what_convert_makes(checkpoint, tmp_path):
    folder, link = tmp_path / "papers", tmp_path / "link"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    link.symlink_to(folder)
    with pytest.raises(OutputError, match=r"papers holds thesis\.tex, which is not ours; it is left as it is"):
        convert(checkpoint, folder, "mini", force=True)
    with pytest.raises(OutputError, match=r"is a link to .*papers; give that folder"):
        convert(checkpoint, link, "mini", force=True)
    assert (link / "thesis.tex").read_text() == "years of work"
    (folder / "thesis.tex").unlink()
    assert convert(checkpoint, folder, "mini", force=True) == folder


@pytest.mark.parametrize("options", [{"model": "maxi"}, {"dtype": "int8"}, {"shard_bytes": 1}], ids=str)
def test_bad_settings(checkpoint, tmp_path, options):
    with pytest.raises(ValueError, match=r"known models|dtype must be|a shard must"):
        convert(checkpoint, tmp_path / "out", **{"model": "mini", **options})


def test_synthetic_weights_depend_on_the_seed_and_on_nothing_else(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        random_checkpoint.write(MODELS["mini"], tmp_path / name, seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c
