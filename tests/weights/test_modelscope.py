"""What works on VideoCrafter2's networks works on a diffusers folder's: LoRAs, FP8, embeddings, the memory plan, provenance."""

import json
from dataclasses import replace

import pytest

from support import diffusers_folders

# isort: split
import torch
from safetensors.torch import save_file

from vstar_engine import Engine, Sampling
from vstar_engine.commands.inspect import command_for
from vstar_engine.commands.main import main
from vstar_engine.config.request import Clip
from vstar_engine.errors import CheckpointError
from vstar_engine.machine import memory
from vstar_engine.networks import fp8
from vstar_engine.prompting.embeddings import Embeddings
from vstar_engine.sampling.fp8_calibration import calibrate
from vstar_engine.weights.checkpoint import Weights
from vstar_engine.weights.convert_child import convert_here
from vstar_engine.weights.lora import Lora, MergedWeights

# layers of a 3-D UNet by diffusers' names, the official ones, and the shape of what changes them
LAYERS = {
    "down_blocks.0.temp_attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.1.2.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.proj_in": "input_blocks.1.1.proj_in",
    "up_blocks.1.temp_convs.0.conv1.2": "output_blocks.2.0.temopral_conv.conv1.2",
    "mid_block.temp_convs.1.conv4.3": "middle_block.3.temopral_conv.conv4.3",
    "transformer_in.proj_in": "init_attn.0.proj_in",
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modelscope")
    saved = diffusers_folders.saved(diffusers_folders.pipeline(), folder / "saved")
    (folder / "weights").mkdir()
    hub = {"id": "ali-vilab/text-to-video-ms-1.7b", "revision": None, "commit": "0" * 40, "file": None}
    convert_here(saved, folder / "weights", "modelscope", "stored", 2**30, lambda **_: None, {"hub": hub})
    return folder / "weights"


@pytest.fixture(scope="module")
def engine(weights):
    return Engine.load("modelscope", weights=weights)


def factors(engine, rank=2):
    shapes = {name: parameter.shape for name, parameter in engine.denoiser.module.named_parameters()}
    made = {}
    for theirs, official in LAYERS.items():
        name = official.replace("temopral_conv", "temporal_conv").replace("attn1.to_q", "attn1.to_qkv") + ".weight"
        out, *rest = shapes[name]
        out = out // 3 if "to_qkv" in name else out
        ones = [1] * (len(rest) - 1)
        made[theirs] = torch.randn(rank, *rest), torch.randn(out, rank, *ones)
    return made


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_loras_of_the_3d_unet_are_merged(engine, weights, tmp_path, layout):
    tensors, made = {}, factors(engine)
    for name, (down, up) in made.items():
        if layout == "kohya":
            bare = "lora_unet_" + name.replace(".", "_")
            tensors |= {f"{bare}.lora_down.weight": down, f"{bare}.lora_up.weight": up, f"{bare}.alpha": torch.tensor(2.0)}
        else:
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    save_file(tensors, tmp_path / "style.safetensors")
    plain = Weights(weights)
    merged = MergedWeights(plain, [Lora.read(tmp_path / "style.safetensors", engine.spec.unet, 0.5)])
    for name, (down, up) in made.items():
        key = f"model.diffusion_model.{LAYERS[name]}.weight"
        wanted = plain[key] + 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(plain[key].shape)
        assert torch.allclose(merged[key], wanted, atol=1e-6)


def test_the_published_defaults_are_the_models(engine):
    video = engine.generate("snow", frames=2, size=(16, 16), sampling=Sampling(steps=1))
    assert video.provenance["weights_from"]["commit"] == "0" * 40
    words = command_for(json.loads(json.dumps(video.provenance)))
    assert f"--weights ali-vilab/text-to-video-ms-1.7b@{'0' * 40}" in words
    assert Sampling.usual(own=engine.spec.defaults) == Sampling(steps=50, guidance=9.0)
    assert Sampling.usual(own=engine.spec.defaults).until == "56%"


def test_fp8_converts_the_layers_of_a_unet_without_a_frame_rate(engine, weights):
    unet = Engine.load("modelscope", weights=weights).denoiser.module
    x, context = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 1, 77, 32)
    given = (x, torch.tensor([[481]]), context, torch.tensor([8]), torch.zeros(1, 2, 3))
    with torch.inference_mode():
        before = unet(*given)
        fp8.convert(unet, calibrate(unet, replace(engine.spec, size=(16, 16)), engine.embed))
        after = unet(*given)
    assert 0 < (after - before).norm() / before.norm() < 0.3


def test_embeddings_state_their_tokenizer(engine, weights, tmp_path, capsys):
    how = ["--model", "modelscope", "--weights", str(weights)]
    out = tmp_path / "snow.safetensors"
    assert main(["embed", "--states", "snow!", *how, "--stored-as", "float32", "--out", str(out)]) == 0, capsys.readouterr().err
    bundle = Embeddings.read(out)
    assert torch.equal(bundle.anchors, engine.embed(["snow!"]))
    padded = replace(engine.spec, text=replace(engine.spec.text, pad=49407))
    with pytest.raises(CheckpointError, match="was made with another tokenizer"):
        bundle.check(padded, engine.text_hash)
    bundle.check(engine.spec, engine.text_hash)


def test_memory_is_planned_by_the_folders_networks(engine):
    clip = Clip(frames=4, size=(16, 16)).fitted(engine.spec)
    small = memory.activation_bytes(memory.Footprint.of(clip, engine.spec, torch.float32))
    large = memory.activation_bytes(memory.Footprint.of(replace(clip, frames=64), engine.spec, torch.float32))
    assert 0 < small < large


def test_a_size_is_checked_by_the_folders_networks(weights, tmp_path, capsys):
    saved = weights.parent / "saved"
    how = ["--model", "modelscope", "--states", "snow", "--out", str(tmp_path / "a.mp4")]
    assert main(["generate", *how, "--weights", str(saved), "--size", "18x16"]) == 2
    assert "both sides multiples of 4 from 4" in capsys.readouterr().err


def test_a_folder_of_another_architecture_names_the_model(weights, tmp_path, capsys):
    how = ["generate", "--model", "mini", "--weights", str(weights), "--states", "snow", "--out", str(tmp_path / "a.mp4")]
    assert main(how) == CheckpointError.exit_code
    assert "are for model modelscope, not mini" in capsys.readouterr().err
