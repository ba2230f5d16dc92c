"""StreamingT2V's checkpoint: its names and shapes are the published ones, and its file is streamed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from support.streaming import SPEC
from vstar_engine.config.models import MODELS
from vstar_engine.errors import CheckpointError
from vstar_engine.networks.image_encoder import ImageTower
from vstar_engine.networks.streaming_unet import StreamingUNet
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.networks.vae import Vae
from vstar_engine.weights import checkpoint, key_map, random_checkpoint
from vstar_engine.weights.convert_child import convert_here, read_official
from vstar_engine.weights.pickle_file import Streamed
from vstar_engine.weights.streaming_keys import IMAGE, OfficialNames, published_shapes

FULL = MODELS["streaming-t2v"]


def test_every_key_and_shape_is_the_published_one():
    listed = json.loads((Path(__file__).parent / "streaming_t2v_keys.json").read_text())
    assert {name: list(shape) for name, shape in published_shapes(FULL).items()} == listed
    assert sum(torch.Size(shape).numel() for shape in listed.values()) == 3_232_602_140


@pytest.fixture(scope="module")
def tensors():
    return {name: random_checkpoint.tensor(name, shape, 3) for name, shape in published_shapes(SPEC).items()}


def test_every_network_is_filled_by_the_published_names(tensors):
    """The text tower's q, k and v are stacked, and what were matrices are 1x1 convolutions."""
    official = OfficialNames(tensors, SPEC)
    parts = {
        key_map.UNET: StreamingUNet(SPEC),
        key_map.VAE: Vae(SPEC.vae),
        key_map.TEXT: TextTower(SPEC.text),
        IMAGE: ImageTower(SPEC.streaming.image),
    }
    for prefix, module in parts.items():
        assert checkpoint.load(module, official, prefix) == []
    qkv = [tensors[f"text_encoder.text_model.encoder.layers.1.self_attn.{one}_proj.weight"] for one in "qkv"]
    assert torch.equal(parts[key_map.TEXT].transformer.resblocks[1].attn.in_proj_weight, torch.cat(qkv))
    up = tensors["vae.decoder.up_blocks.0.resnets.0.conv1.weight"]
    assert torch.equal(parts[key_map.VAE].decoder.up[1].block[0].conv1.weight, up)
    fuser = tensors["base_model.cross_attention_merger_down_blocks.3.temporal_transformer.attention.to_k.weight"]
    assert torch.equal(parts[key_map.UNET].fusers[3].attention.to_kv.weight[: len(fuser)], fuser)


@pytest.mark.parametrize("wrong", ["missing", "unknown", "misshapen"])
def test_names_are_strict(tensors, wrong):
    name = "base_model.mid_block.attentions.0.transformer_blocks.0.attn2.alpha"
    given = dict(tensors)
    if wrong == "missing":
        del given[name]
    elif wrong == "unknown":
        given = {name.replace("alpha", "beta"): torch.zeros(()), **given}
    else:
        given[name] = torch.zeros(2)
    official = OfficialNames(given, SPEC)
    if wrong == "unknown":  # it keeps its own name, which is listed as not needed
        assert name.replace("alpha", "beta") in official
        return
    with pytest.raises(CheckpointError, match="alpha"):
        checkpoint.load(StreamingUNet(SPEC), official, key_map.UNET)


def test_another_models_name_is_said(tmp_path, tensors):
    torch.save({"state_dict": tensors}, tmp_path / "streaming.ckpt")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="give --model streaming-t2v"):
        convert_here(tmp_path / "streaming.ckpt", tmp_path / "out", "videocrafter2", "float16", 2**29, lambda **_: None, {})


def test_what_cannot_be_mapped_whole_is_read_tensor_by_tensor(tmp_path, tensors, monkeypatch):
    path, load = tmp_path / "streaming.ckpt", torch.load
    torch.save({"state_dict": {**tensors, "half": torch.arange(6.0).half()[::2]}}, path)

    def refusing(source, *given, mmap=False, **named):
        if mmap:
            raise RuntimeError("unable to mmap 25571632234 bytes from file: Cannot allocate memory (12)")
        return load(source, *given, **named)

    monkeypatch.setattr(torch, "load", refusing)
    read = read_official(path)
    assert isinstance(read.tensors, Streamed)
    assert read["half"].tolist() == [0.0, 2.0, 4.0]
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.slow
def test_a_file_of_the_full_size_is_streamed(tmp_path):
    """Holes instead of data: 25.6 GB, half of it an optimizer's; the reading process is held to 2 GiB."""
    path = tmp_path / "streaming_t2v.ckpt"
    with FakeTensorMode():
        state = {name: torch.empty(shape) for name, shape in published_shapes(FULL).items()}
        moments = {"exp_avg": torch.empty(1_580_000_000), "exp_avg_sq": torch.empty(1_580_000_000)}
    with torch.serialization.skip_data(materialize_fake_tensors=True), path.open("wb") as file:
        torch.save({"state_dict": state, "optimizer_states": [{"state": {0: moments}}], "epoch": 3}, file)
    assert path.stat().st_size > 25.5e9
    assert os.stat(path).st_blocks * 512 < 1e9
    convert = [sys.executable, "-m", "vstar_engine", "convert", str(path), str(tmp_path / "out"), "--model", "streaming-t2v"]
    done = subprocess.run(convert, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "optimizer_states, epoch" in done.stderr
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) > 2 * 3_232_602_140
