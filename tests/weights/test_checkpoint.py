"""Weights: the official naming, strict loading, and conversion of whatever a user may have."""

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import save_file

from vstar_engine import Engine
from vstar_engine.config.models import MODELS, TextSpec, UNetSpec, VaeSpec
from vstar_engine.errors import CheckpointError
from vstar_engine.networks.blocks import TemporalConvBlock
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.networks.unet import UNet
from vstar_engine.networks.vae import Vae
from vstar_engine.weights.checkpoint import Weights, load
from vstar_engine.weights.key_map import TEXT, UNET, VAE, module_shapes, official_shapes
from vstar_engine.weights.official_config import spec_from_official

OFFICIAL = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_head_channels": 64,
    "transformer_depth": 1,
    "context_dim": 1024,
    "use_linear": True,
    "use_checkpoint": True,
    "temporal_conv": True,
    "temporal_attention": True,
    "temporal_selfatt_only": True,
    "use_relative_position": False,
    "use_causal_attention": False,
    "temporal_length": 16,
    "addition_attention": True,
    "fps_cond": True,
}


@pytest.fixture(scope="module")
def block_weights():
    torch.manual_seed(1)
    return {name: torch.randn(shape) for name, shape in module_shapes(TemporalConvBlock(32)).items()}


def test_the_official_key_count():
    shapes = official_shapes(MODELS["videocrafter2"])
    assert len(shapes) == 2039
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 1_850_984_324
    counts = {prefix: sum(name.startswith(prefix) for name in shapes) for prefix in (UNET, VAE, TEXT)}
    assert counts == {UNET: 1484, VAE: 248, TEXT: 294}
    assert shapes[UNET + "input_blocks.1.0.temopral_conv.conv2.3.weight"] == (320, 320, 3, 1, 1)
    assert shapes[UNET + "init_attn.0.proj_in.weight"] == (512, 320, 1)
    assert shapes[TEXT + "transformer.resblocks.23.attn.in_proj_weight"] == (3072, 1024)


def test_official_configurations_become_specs():
    assert spec_from_official(OFFICIAL) == UNetSpec()
    dd = {"double_z": True, "z_channels": 4, "resolution": 512, "in_channels": 3, "out_ch": 3, "ch": 128}
    assert (
        spec_from_official({**dd, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0})
        == VaeSpec()
    )
    clip = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}
    assert spec_from_official(clip) == TextSpec()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"use_relative_position": True}, "use_relative_position"),
        ({"use_causal_attention": True}, "use_causal_attention"),
        ({"riddle": 1}, "unknown settings.*riddle"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_of_another_network_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        spec_from_official({**OFFICIAL, **change})


def test_numpy_arrays_and_meta_modules_load(block_weights):
    with torch.device("meta"):
        block = TemporalConvBlock(32)
    load(block, {name: value.numpy() for name, value in block_weights.items()}, dtype=torch.float16)
    assert torch.equal(block.conv2[3].weight, block_weights["conv2.3.weight"].half())
    assert block.conv2[3].weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_fused_projections_are_stacked_in_order():
    shapes = module_shapes(UNet(UNetSpec(32, (1,), 1, (0,), 8, 12)))
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    net = UNet(UNetSpec(32, (1,), 1, (0,), 8, 12))
    load(net, weights)
    prefix = "input_blocks.1.2.transformer_blocks.0.attn1."
    parts = [weights[f"{prefix}to_{x}.weight"] for x in "qkv"]
    assert torch.equal(net.input_blocks[1][2].transformer_blocks[0].attn1.to_qkv.weight, torch.cat(parts))


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "nan", "infinite"])
def test_faults_are_refused(block_weights, fault):
    weights, name = dict(block_weights), "conv3.3.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "unknown":
        weights["conv9.3.weight"] = torch.ones(2)
    elif fault == "shape":
        weights[name] = weights[name][:, :, :, 0]
    else:
        weights[name] = weights[name] * {"nan": torch.nan, "infinite": torch.inf}[fault]
    with pytest.raises(CheckpointError, match=r"conv[39]\.3\.weight"):
        load(TemporalConvBlock(32), weights)


def test_a_value_too_large_for_the_dtype_is_refused(block_weights):
    weights = {**block_weights, "conv1.0.bias": torch.full((32,), 1e6)}
    with pytest.raises(CheckpointError, match="float16"):
        load(TemporalConvBlock(32), weights, dtype=torch.float16)


def test_what_text_to_video_does_not_need_is_named():
    params = {"width": 12, "heads": 2, "layers": 3, "vocab_size": 49408, "context_length": 77}
    unused = load(TextTower(TextSpec(**params)), GOLDEN / "tiny_model.safetensors", TEXT)
    assert {name.removeprefix(TEXT).split(".")[0] for name in unused} == {"transformer", "text_projection", "logit_scale"}
    assert all(".resblocks.2." in name for name in unused if "transformer" in name)


def test_all_weights_of_a_model_are_used_or_named(mini, mini_weights):
    needed = {TEXT: TextTower(mini.spec.text), VAE: Vae(mini.spec.vae, encoder=False), UNET: mini.denoiser}
    used = {prefix + name for prefix, module in needed.items() for name in module_shapes(module)}
    assert used | set(mini.unused) == set(Weights(mini_weights))
    assert not used & set(mini.unused)


def test_weights_without_what_is_not_needed_load_too(mini, mini_weights, tmp_path):
    kept = {name: tensor for name, tensor in Weights(mini_weights).items() if name not in mini.unused}
    save_file(kept, tmp_path / "kept.safetensors")
    assert Engine.load("mini", tmp_path / "kept.safetensors").unused == []


@pytest.mark.parametrize("fault", ["altered", "shortened", "gone", "no manifest", "other model", "not json", "other kind"])
def test_damaged_folders_are_refused(mini_weights, tmp_path, fault):
    folder = tmp_path / "weights"
    folder.mkdir()
    manifest = (mini_weights / "manifest.json").read_text()
    data = bytearray((mini_weights / "model.safetensors").read_bytes())
    if fault == "altered":
        data[-5] ^= 1
    elif fault == "shortened":
        del data[-5:]
    elif fault == "other model":
        manifest = manifest.replace('"mini"', '"maxi"')
    elif fault == "not json":
        manifest = manifest[:-9]
    elif fault == "other kind":
        manifest = manifest.replace("vstar-engine weights", "soup")
    if fault != "gone":
        (folder / "model.safetensors").write_bytes(data)
    if fault != "no manifest":
        (folder / "manifest.json").write_text(manifest)
    wanted = {"altered": "sha256", "shortened": "bytes where", "gone": "missing", "no manifest": "convert"}
    with pytest.raises(CheckpointError, match=wanted.get(fault, "maxi|JSON|describe")):
        Engine.load("mini", folder)


def test_a_path_that_is_not_there():
    with pytest.raises(CheckpointError, match="no weights at"):
        Weights("nowhere")


def test_a_file_that_is_no_safetensors(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"<html>" * 100)
    with pytest.raises(CheckpointError, match="is a web page"):
        Weights(tmp_path / "x.safetensors")
