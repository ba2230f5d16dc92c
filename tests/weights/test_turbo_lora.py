"""A LoRA that is a bare list of tensors: each pair finds its layer by the order of registration, and nothing else is taken."""

import re

import pytest
import torch

from vstar_engine import Engine
from vstar_engine.commands.main import main
from vstar_engine.config.models import MODELS, UNetSpec
from vstar_engine.errors import CheckpointError
from vstar_engine.networks.layers import sinusoid
from vstar_engine.weights import bundled
from vstar_engine.weights.checkpoint import Weights
from vstar_engine.weights.key_map import UNET
from vstar_engine.weights.lora import Lora, MergedWeights, layer_shapes
from vstar_engine.weights.turbo_lora import PROJECTION, embedded, named, parts_of

SMALL = UNetSpec(model_channels=64, channel_mult=(1,), num_res_blocks=1, attention_levels=(0,), context_dim=48)
MINI = MODELS["mini"].unet
FULL = MODELS["videocrafter2"].unet
RANK = 3


def residual(block, skip=False):
    ends = ["in_layers.2", "emb_layers.1", "out_layers.3", *(["skip_connection"] if skip else [])]
    return [f"{block}.{end}" for end in (*ends, *(f"temopral_conv.conv{n}.{2 if n == 1 else 3}" for n in (1, 2, 3, 4)))]


def transformer(block, ends=True):
    inner = [f"attn1.to_{x}" for x in ("q", "k", "v", "out.0")] + ["ff.net.0.proj", "ff.net.2"]
    inner += [f"attn2.to_{x}" for x in ("q", "k", "v", "out.0")]
    whole = [f"transformer_blocks.0.{layer}" for layer in inner]
    return [f"{block}.{layer}" for layer in (["proj_in", *whole, "proj_out"] if ends else whole)]


def stage(block, skip=False):
    return [*residual(f"{block}.0", skip), *transformer(f"{block}.1"), *transformer(f"{block}.2")]


# what `named_modules` of the published UNet goes through, written down
EMBEDDINGS = ["time_embed.0", "time_embed.2", "fps_embedding.0", "fps_embedding.2"]
INPUT = ["input_blocks.0.0", *stage("input_blocks.1")]
STEM = transformer("init_attn.0", ends=False)  # its ends are 1-D convolutions
MIDDLE = [*stage("middle_block"), *residual("middle_block.3")]
OUTPUT = [*stage("output_blocks.0", skip=True), *stage("output_blocks.1", skip=True), "out.2"]
ORDERS = {
    "without guidance": [*EMBEDDINGS, *INPUT, *STEM, *MIDDLE, *OUTPUT],
    "guidance before the blocks": [*EMBEDDINGS, PROJECTION, *INPUT, *STEM, *MIDDLE, *OUTPUT],
    "guidance between": ["time_embed.0", "time_embed.2", PROJECTION, *EMBEDDINGS[2:], *STEM, *INPUT, *MIDDLE, *OUTPUT],
}


def pairs(order, spec=SMALL, seed=0):
    """A pair for each layer, as convolutions keep theirs."""
    shapes, chance = {**layer_shapes(spec), PROJECTION: (spec.model_channels, 256)}, torch.Generator().manual_seed(seed)
    made = {}
    for layer in order:
        out, into, *kernel = shapes[layer]
        up = torch.randn(out, RANK, *[1] * len(kernel), generator=chance)
        made[layer] = (up, torch.randn(RANK, into, *kernel, generator=chance))
    return made


def listed(made):
    return [tensor for pair in made.values() for tensor in pair]


@pytest.mark.parametrize("order", ORDERS)
def test_every_pair_finds_its_layer(order):
    made = pairs(ORDERS[order])
    got = named(listed(made), SMALL, 7.5, "a file")
    for layer, (up, down) in made.items():
        if layer == PROJECTION:
            torch.testing.assert_close(got["guided"], up @ down @ embedded(7.5).float(), rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(got[f"{layer}.lora_up.weight"], up), layer
            assert torch.equal(got[f"{layer}.lora_down.weight"], down), layer
    assert len(got) == 2 * len(made) - (PROJECTION in made)


def test_the_full_network_has_a_pair_for_every_layer_but_1d_convolutions():
    layers = [layer for part in parts_of(FULL).values() for layer, _ in part]
    missing = set(layer_shapes(FULL)) - set(layers)
    assert missing == {"init_attn.0.proj_in", "init_attn.0.proj_out"}
    assert layers.index("input_blocks.2.0.in_layers.2") < layers.index("input_blocks.10.0.in_layers.2")


def test_guidance_is_embedded_as_consistency_models_do():
    got = embedded(7.5)
    assert got.shape == (256,)
    assert got[0] == pytest.approx(torch.sin(torch.tensor(7500.0, dtype=torch.float64)).item())
    assert got[127] == pytest.approx(torch.sin(torch.tensor(0.75, dtype=torch.float64)).item())
    assert got[255] == pytest.approx(torch.cos(torch.tensor(0.75, dtype=torch.float64)).item())


def converted(folder, content, *options):
    torch.save(content, folder / "unet_lora.pt")
    words = ["convert", str(folder / "unet_lora.pt"), str(folder / "turbo.safetensors"), "--model", "mini", *options]
    return main(words), folder / "turbo.safetensors"


@pytest.fixture(scope="module")
def turbo():
    """A whole file for the mini model."""
    parts = parts_of(MINI)
    made = pairs([layer for part in parts.values() for layer, _ in part], MINI)
    return {layer: (up.half(), down.half()) for layer, (up, down) in made.items()}


def test_a_converted_file_is_merged_and_what_guidance_adds_is_in_the_bias(turbo, tmp_path):
    code, path = converted(tmp_path, listed(turbo), "--embedded-guidance", "3")
    assert code == 0
    lora = Lora.read(path, MINI, 0.01)
    base = Weights(bundled.FOLDER / "mini")
    merged = MergedWeights(base, [lora])
    for layer in ("input_blocks.1.0.temopral_conv.conv2.3", "middle_block.1.transformer_blocks.0.attn2.to_k"):
        up, down = (tensor.flatten(1).double() for tensor in turbo[layer])
        before = base[f"{UNET}{layer}.weight"]
        expected = before.double() + 0.01 * (up @ down).reshape(before.shape)
        torch.testing.assert_close(merged[f"{UNET}{layer}.weight"].double(), expected, rtol=1e-4, atol=1e-5)
    up, down = (tensor.double() for tensor in turbo[PROJECTION])
    added = 0.01 * (up @ (down @ embedded(3.0))).float()
    weight, bias = (merged[f"{UNET}time_embed.0.{kind}"].float() for kind in ("weight", "bias"))
    time = sinusoid(torch.tensor([[371.0]]), MINI.model_channels)[0]
    told = (time + added) @ weight.T + base[f"{UNET}time_embed.0.bias"].float()
    torch.testing.assert_close(time @ weight.T + bias, told, rtol=1e-4, atol=1e-4)
    assert not torch.equal(bias, base[f"{UNET}time_embed.0.bias"].float())


def test_an_engine_takes_a_converted_file(turbo, tmp_path):
    _, path = converted(tmp_path, listed(turbo))
    engine = Engine.load("mini", loras=[f"{path}:0.5"])
    up, down = (tensor.double() for tensor in turbo[PROJECTION])
    weight, bias = (tensor.double() for tensor in engine.denoiser.time_embed[0].parameters())
    before = Weights(bundled.FOLDER / "mini")[f"{UNET}time_embed.0.bias"].double()
    torch.testing.assert_close(bias, before + weight @ (0.5 * up @ (down @ embedded(7.5))), rtol=1e-4, atol=1e-3)


def swapped(content):
    """Two pairs of other shapes in each other's place."""
    return [*content[:2], *content[-2:], *content[4:-2], *content[2:4]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content[:-1], "tensors, which are no pairs of up and down"),
        (lambda content: content[:-2], r"ends after \d+ pairs, before out"),
        (lambda content: [*content, *content[-2:]], r"from pair \d+ of \d+, up .* no part that is left \(none\)"),
        (swapped, r"does not fit this UNet: from pair 1 of \d+, up .* has layers of those shapes"),
        (lambda content: dict(enumerate(content)), "holds a dict where a LoRA's list of matrices"),
        (lambda content: [], "holds a list of 0 where a LoRA's list"),
        (lambda content: [content[0] * torch.nan, *content[1:]], "layer time_embed.0"),
        (
            lambda content: [content[0].to(torch.float8_e4m3fn), *content[1:]],
            "layer time_embed.0 is in torch.float8_e4m3fn; save",
        ),
        (
            lambda content: [content[0][:, :0], content[1][:0], *content[2:]],
            r"time_embed.0 is \(128, 0\), which is empty; a LoRA has",
        ),
    ],
)
def test_what_is_no_such_list_is_refused(turbo, change, said):
    with pytest.raises(CheckpointError, match=said):
        named(change(listed(turbo)), MINI, 7.5, "a file")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(2, 2)], "holds 1 tensors, which are no pairs of up and down"),
        ([re.compile, torch.ones(2, 2)], "holds something other than tensors, which is never executed"),
    ],
)
def test_the_command_refuses_in_one_sentence_and_leaves_nothing(tmp_path, capsys, content, said):
    code, _ = converted(tmp_path, content)
    assert code == CheckpointError.exit_code
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["unet_lora.pt"]


def test_a_list_that_is_to_be_a_folder_is_told_what_to_name(turbo, tmp_path, capsys):
    torch.save(listed(turbo), tmp_path / "unet_lora.pt")
    assert main(["convert", str(tmp_path / "unet_lora.pt"), str(tmp_path / "folder"), "--model", "mini"]) != 0
    assert "if that is a LoRA, name a file to make of it, NAME.safetensors" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "unet_lora.pt"), str(tmp_path / "a.safetensors"), "--embedded-guidance", "nan"]) != 0
    assert "the embedded guidance must be a finite number, got nan" in capsys.readouterr().err
