"""LoRA files in each layout give the same merged weights; what does not fit is refused with what was expected."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from support.lora_files import ALPHA, LAYERS, LAYOUTS, MINI, PROJ, RANK, SHAPES, TO_Q, diffusers_names, factors, kohya, peft
from vstar_engine import Engine, Sampling
from vstar_engine.commands.inspect import command_for
from vstar_engine.commands.main import main
from vstar_engine.config.models import model_named
from vstar_engine.errors import CheckpointError
from vstar_engine.weights import bundled
from vstar_engine.weights.checkpoint import Weights
from vstar_engine.weights.key_map import UNET
from vstar_engine.weights.lora import Lora, MergedWeights, layer_shapes, names


@pytest.fixture(scope="module")
def full():
    spec = model_named("videocrafter2").unet
    return names(spec, layer_shapes(spec))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_merges_to_the_definition(layout, tmp_path):
    write, layers = LAYOUTS[layout]
    made = factors(layers)
    save_file(write(made), tmp_path / "lora.safetensors")
    base = Weights(bundled.FOLDER / "mini")
    merged = MergedWeights(base, [Lora.read(tmp_path / "lora.safetensors", MINI, strength=0.5)])
    assert set(merged) == set(base)
    for layer, (down, up) in made.items():
        name = f"{UNET}{layer}.weight"
        product = torch.einsum("or,ri->oi", up.flatten(1).double(), down.flatten(1).double()).reshape(SHAPES[layer])
        expected = base[name].double() + 0.5 * ALPHA / RANK * product
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-5)
    untouched = f"{UNET}out.2.weight"
    assert torch.equal(merged[untouched], base[untouched])
    assert merged[untouched].dtype == base[untouched].dtype


CONFIGURED = {
    "alpha": ({"unet.r": RANK, "unet.lora_alpha": ALPHA}, ALPHA / RANK),
    "by the root of the rank": ({"unet.lora_alpha": ALPHA, "unet.use_rslora": True}, ALPHA / RANK**0.5),
    "a text tower's": ({"text_encoder.lora_alpha": ALPHA}, 1.0),
}


@pytest.mark.parametrize("case", CONFIGURED)
def test_alpha_in_the_metadata_counts(case, tmp_path):
    told, scale = CONFIGURED[case]
    path = tmp_path / "lora.safetensors"
    save_file(peft(factors([TO_Q]), scale=1.0), path, metadata={"lora_adapter_metadata": json.dumps(told)})
    assert Lora.read(path, MINI).layers[TO_Q].scale == pytest.approx(scale)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"unet.lora_alpha": 6, "unet.alpha_pattern": {"to_q": 3}}', "its metadata sets alpha_pattern, which is not read"),
        ("[1]", "is no configuration of a LoRA"),
        ('{"unet.lora_alpha": "x"}', "is no configuration of a LoRA"),
        ('{"unet.lora_alpha": NaN}', "lora_alpha is nan"),
        ('{"unet.use_rslora": true}', r"sets use_rslora, which .*, and layer .*to_q has no alpha: save it with lora_alpha in"),
        ('{"text_encoder.lora_alpha": 6, "unet.use_rslora": true}', "has no alpha"),
    ],
)
def test_metadata_that_cannot_be_followed_is_refused(text, said, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(peft(factors([TO_Q])), path, metadata={"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match=said):
        Lora.read(path, MINI)


def test_a_layers_own_alpha_goes_by_the_root_of_the_rank(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(kohya(factors([TO_Q])), path, metadata={"lora_adapter_metadata": '{"unet.use_rslora": true}'})
    assert Lora.read(path, MINI).layers[TO_Q].scale == pytest.approx(ALPHA / RANK**0.5)


def test_several_add_up(tmp_path):
    made = factors([TO_Q])
    save_file(kohya(made), tmp_path / "lora.safetensors")
    base, name = Weights(bundled.FOLDER / "mini"), f"{UNET}{TO_Q}.weight"
    one, other = (Lora.read(tmp_path / "lora.safetensors", MINI, strength) for strength in (0.3, 0.7))
    whole = Lora.read(tmp_path / "lora.safetensors", MINI)
    torch.testing.assert_close(MergedWeights(base, [one, other])[name], MergedWeights(base, [whole])[name])
    opposite = Lora.read(tmp_path / "lora.safetensors", MINI, -0.3)
    torch.testing.assert_close(MergedWeights(base, [one, opposite])[name], base[name].float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("diffusers", "official"),
    [
        ("conv_in", "input_blocks.0.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k", "input_blocks.2.1.transformer_blocks.0.attn2.to_k"),
        ("down_blocks.2.resnets.0.conv_shortcut", "input_blocks.7.0.skip_connection"),
        ("down_blocks.1.downsamplers.0.conv", "input_blocks.6.0.op"),
        ("down_blocks.3.resnets.1.time_emb_proj", "input_blocks.11.0.emb_layers.1"),
        ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
        ("mid_block.resnets.1.conv2", "middle_block.3.out_layers.3"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.3.conv"),
        (
            "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj",
            "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj",
        ),
        ("conv_out", "out.2"),
    ],
)
def test_diffusers_names_of_the_full_model(diffusers, official, full):
    assert full[diffusers] == official


def test_every_layer_has_one_diffusers_name(full):
    table = {name: official for name, official in full.items() if name != official}
    assert set(table.values()) == set(full.values())
    assert len(table) == len(set(full.values()))


def planted(made, change):
    """A kohya file of TO_Q with one thing wrong."""
    parts, name = kohya(made), "lora_unet_" + TO_Q.replace(".", "_")
    if change == "unknown layer":
        parts["lora_unet_down_blocks_9_proj_in.lora_down.weight"] = torch.zeros(3, 3)
    elif change == "no up":
        del parts[f"{name}.lora_up.weight"]
    elif change == "other width":
        parts[f"{name}.lora_down.weight"] = torch.zeros(RANK, 7)
    elif change == "other rank":
        parts[f"{name}.lora_up.weight"] = torch.zeros(32, RANK + 1)
    elif change == "not finite":
        parts[f"{name}.lora_up.weight"][0, 0] = float("nan")
    elif change == "another kind":
        parts[f"{name}.hada_w1_a"] = torch.zeros(3, 3)
    else:
        parts = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(3, 3)}
    return parts


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("unknown layer", "1 of its 2 layers are unknown (down_blocks_9_proj_in); expected layers such as input_blocks_1_1_"),
        ("no up", "has only alpha, down of layer"),
        ("other width", "changes 32x7 where the weight is (32, 32)"),
        ("other rank", "which do not multiply"),
        ("not finite", "NaN or infinite"),
        ("another kind", "LoHa, LoKr, DoRA and other kinds are not read"),
        ("text only", "changes no layer of the UNet; it is for a text tower"),
    ],
)
def test_what_does_not_fit_is_refused(change, said, tmp_path):
    save_file(planted(factors([TO_Q]), change), tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError) as refused:
        Lora.read(tmp_path / "lora.safetensors", MINI)
    assert said in str(refused.value)


KEY = "lora_unet_" + TO_Q.replace(".", "_")
DOWN = f"{KEY}.lora_down.weight"
# what is put in the place of a right file's tensors, and what is said of it
WRONG = {
    "rank 0": (
        {DOWN: torch.zeros(0, 32), f"{KEY}.lora_up.weight": torch.zeros(32, 0)},
        rf"{DOWN} is \(0, 32\), which is empty; a LoRA has a rank of 1 or more",
    ),
    "a number for a matrix": ({DOWN: torch.tensor(1.0)}, rf"{DOWN} is \(\); a matrix or a kernel is needed"),
    "a row for a matrix": ({f"{KEY}.lora_up.weight": torch.ones(32)}, rf"{KEY}.lora_up.weight is \(32,\); a matrix"),
    "float8": (
        {DOWN: torch.ones(RANK, 32).to(torch.float8_e4m3fn)},
        rf"{DOWN} is in torch.float8_e4m3fn; save it in float16, bfloat16 or float32",
    ),
    "whole numbers": ({DOWN: torch.ones(RANK, 32, dtype=torch.int8)}, f"{DOWN} is in torch.int8; save it in"),
    "two alphas": (
        {f"{KEY}.alpha": torch.tensor([6.0, 6.0])},
        rf"{KEY}.alpha must be one finite number, got 2 values",
    ),
    "alpha that is none": ({f"{KEY}.alpha": torch.tensor(torch.nan)}, f"{KEY}.alpha must be one finite number, got nan"),
    "a layer with two prefixes": (
        {f"unet.{TO_Q}.lora_down.weight": torch.ones(RANK, 32)},
        f"changes layer {TO_Q} twice, by .*lora_down.weight and by .*lora_down.weight; leave one of them in",
    ),
    "a layer by two names": (
        {f"{diffusers_names({TO_Q: ()}).popitem()[0]}.lora_A.weight": torch.ones(RANK, 32)},
        f"changes layer {TO_Q} twice, by .*lora_A.weight and by .*lora_down.weight; leave one of them in",
    ),
    "a guidance of eighths": ({"guided": torch.ones(MINI.model_channels).to(torch.float8_e5m2)}, "guided is in torch.float8"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_tensors_that_no_layer_has_are_named_with_their_file(fault, tmp_path, capsys):
    changed, said = WRONG[fault]
    path = tmp_path / "lora.safetensors"
    save_file(kohya(factors([TO_Q])) | changed, path)
    assert main(["generate", "--model", "mini", "--states", "winter", "--out", str(tmp_path / "a.mp4"), f"--lora={path}"]) == 3
    told = capsys.readouterr().err.strip().splitlines()
    assert re.match(f"vstar-engine: {path}:? {said}", told[-1])
    assert not any(line.startswith("Traceback") for line in told)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(b"\xff\0\0\0\0\0\0\0{")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Lora.read(tmp_path / "lora.safetensors", MINI)


def test_parts_of_a_text_tower_are_named(tmp_path, caplog):
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    save_file(kohya(factors([TO_Q])) | {text: torch.zeros(3, 3)}, tmp_path / "lora.safetensors")
    Lora.read(tmp_path / "lora.safetensors", MINI)
    assert f"1 tensors for a text tower ({text})" in caplog.text


@pytest.fixture
def file(tmp_path):
    save_file(kohya(factors(LAYERS)), tmp_path / "a lora.safetensors")
    return str(tmp_path / "a lora.safetensors")


def test_a_strength_is_read_after_a_colon(file):
    assert [Lora.parse(text, MINI).strength for text in (file, f"{file}:0.5", f"{file}:-2")] == [1.0, 0.5, -2.0]
    for wrong in ("much", "nan", ""):
        with pytest.raises(ValueError, match="FILE or FILE:STRENGTH"):
            Lora.parse(f"{file}:{wrong}", MINI)


def test_a_fingerprint_knows_files_and_strengths(file):
    base = Weights(bundled.FOLDER / "mini")
    prints = [MergedWeights(base, [Lora.parse(text, MINI)]).fingerprint() for text in (file, f"{file}:0.5", file)]
    assert prints[0] == prints[2]
    assert len({base.fingerprint(), *prints}) == 3


def test_an_engine_takes_loras_and_gives_them_back_to_the_bit(file, tmp_path):
    engine = Engine.load("mini", loras=[f"{file}:0.5"])
    adapted = {name: value.clone() for name, value in engine.denoiser.state_dict().items()}
    video = engine.generate("winter", frames=2, sampling=Sampling(steps=1))
    assert video.provenance["loras"][0]["lora"] == f"{file}:0.5"
    assert f"'--lora={file}:0.5'" in command_for(video.provenance)
    engine.adapt()
    plain = Engine.load("mini").denoiser.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in engine.denoiser.state_dict().items())
    assert "loras" not in engine.generate("winter", frames=2, sampling=Sampling(steps=1)).provenance
    engine.adapt([f"{file}:0.25", f"{file}:0.25"])
    now = engine.denoiser.state_dict()
    changed = {name for name in now if not torch.equal(now[name], plain[name])}
    assert len(changed) == len(LAYERS)
    assert all(torch.allclose(now[name], adapted[name], atol=1e-6) for name in now)


def test_an_engine_keeps_what_it_has_where_a_lora_does_not_fit(file, tmp_path):
    engine = Engine.load("mini", loras=[file])
    before = {name: value.clone() for name, value in engine.denoiser.state_dict().items()}
    save_file(planted(factors([TO_Q]), "other width"), tmp_path / "other.safetensors")
    huge = factors([PROJ])
    save_file(kohya({PROJ: (1e30 * huge[PROJ][0], 1e30 * huge[PROJ][1])}), tmp_path / "huge.safetensors")
    for name, said in (("other", "where the weight is"), ("huge", "NaN or infinite")):
        with pytest.raises(CheckpointError, match=said):
            engine.adapt([str(tmp_path / f"{name}.safetensors")])
        assert all(torch.equal(value, before[name]) for name, value in engine.denoiser.state_dict().items())
        assert [str(lora) for lora in engine.loras] == [f"{file}:1"]


def test_the_command_line_refuses_what_does_not_fit(tmp_path, capsys):
    code = main(["generate", "--model", "mini", "--states", "winter", "--lora", str(tmp_path / "none.safetensors")])
    assert code == 3
    assert "there is no LoRA at" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lora_alpha", "network_alpha", "alpha", "ss_network_alpha"])
def test_other_trainers_alpha_in_the_metadata_counts(name, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(peft(factors([TO_Q]), scale=1.0), path, metadata={name: "16"})
    assert Lora.read(path, MINI).layers[TO_Q].scale == pytest.approx(16 / RANK)


def adapter(folder, **told):
    """A folder as PEFT writes it."""
    save_file(peft(factors([TO_Q]), "base_model.model.", 1.0), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 16, **told}))
    return folder / "adapter_model.safetensors"


def test_the_configuration_beside_a_file_counts(tmp_path):
    assert Lora.read(adapter(tmp_path), MINI).layers[TO_Q].scale == pytest.approx(16 / RANK)
    assert Lora.read(tmp_path, MINI).layers[TO_Q].scale == pytest.approx(16 / RANK)
    assert Lora.read(adapter(tmp_path, use_rslora=True), MINI).layers[TO_Q].scale == pytest.approx(16 / RANK**0.5)


@pytest.mark.parametrize(
    "told", [{"alpha_pattern": {"to_q": 8}}, {"use_dora": True}, {"peft_type": "LOHA"}, {"lora_alpha": "x"}]
)
def test_a_configuration_beside_that_cannot_be_followed_is_refused(told, tmp_path):
    with pytest.raises(CheckpointError, match=r"adapter_config\.json beside it (sets|says|is no)"):
        Lora.read(adapter(tmp_path, **told), MINI)


def test_a_configuration_beside_several_files_is_remarked_on(tmp_path, caplog):
    adapter(tmp_path)
    save_file(peft(factors([TO_Q]), scale=1.0), tmp_path / "other.safetensors")
    assert Lora.read(tmp_path / "other.safetensors", MINI).layers[TO_Q].scale == 1.0
    assert "adapter_config.json beside it is not read" in caplog.text


def renamed(change):
    return {change(name): tensor for name, tensor in peft(factors([TO_Q])).items()}


NAMES = ["default", "default_0", "my.style"]


@pytest.mark.parametrize("name", NAMES)
def test_an_adapters_name_in_the_keys(name, tmp_path):
    save_file(renamed(lambda key: key.replace(".weight", f".{name}.weight")), tmp_path / "l.safetensors")
    assert list(Lora.read(tmp_path / "l.safetensors", MINI).layers) == [TO_Q]


def test_two_adapters_are_named(tmp_path):
    two = {
        f"{key[:-7]}.{name}.weight": tensor
        for name in "ab"
        for key, tensor in peft(factors([(TO_Q, PROJ)[name == "b"]])).items()
    }
    save_file(two, tmp_path / "l.safetensors")
    with pytest.raises(CheckpointError, match="holds 2 adapters, a, b; save one"):
        Lora.read(tmp_path / "l.safetensors", MINI)


@pytest.mark.parametrize(
    "prefix",
    [
        *("_orig_mod.", "module.", "base_model.model._orig_mod.", "pipe.unet.", "transformer.", "pipeline.transformer."),
        *("denoiser.", "model.unet.", "model.diffusion_model.", "lycoris_", "lora_transformer_"),
    ],
)
def test_wrappers_prefixes(prefix, tmp_path):
    save_file(renamed(lambda key: prefix + key.removeprefix("unet.")), tmp_path / "l.safetensors")
    assert list(Lora.read(tmp_path / "l.safetensors", MINI).layers) == [TO_Q]


STRANGE = {
    "lora_B.bias": "biases are",
    "modules_to_save.default.weight": "whole layers",
    "diff": "differences of whole tensors",
}


@pytest.mark.parametrize("end", STRANGE)
def test_what_no_plain_lora_has_is_named(end, tmp_path):
    save_file({**peft(factors([TO_Q])), f"unet.{TO_Q}.{end}": torch.ones(3)}, tmp_path / "l.safetensors")
    with pytest.raises(CheckpointError, match=STRANGE[end]):
        Lora.read(tmp_path / "l.safetensors", MINI)


def test_an_unknown_prefix_is_named(tmp_path):
    save_file(renamed(lambda key: "student." + key.removeprefix("unet.")), tmp_path / "l.safetensors")
    with pytest.raises(CheckpointError, match=r"as if student_\* stood before each"):
        Lora.read(tmp_path / "l.safetensors", MINI)


def test_a_pickled_dictionary_is_converted_with_its_alpha(tmp_path, capsys):
    adapter(tmp_path).unlink()
    torch.save({"state_dict": peft(factors([TO_Q]), "base_model.model.", 1.0)}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"vstar-engine convert adapter_model\.bin adapter_model\.safetensors"):
        Lora.read(tmp_path / "adapter_model.bin", MINI)
    made = tmp_path / "elsewhere.safetensors"
    assert main(["convert", str(tmp_path / "adapter_model.bin"), str(made), "--model", "mini"]) == 0
    (tmp_path / "adapter_config.json").unlink()
    assert Lora.read(made, MINI).layers[TO_Q].scale == pytest.approx(16 / RANK)


def test_a_missing_alpha_is_said(tmp_path, caplog):
    """Else a LoRA trained with another alpha than its rank changes too much or too little, without a word."""
    path = tmp_path / "lora.safetensors"

    def said(tensors, **metadata):
        caplog.clear()
        save_file(tensors, path, metadata)
        Lora.read(path, MINI)
        return caplog.text

    made = factors([TO_Q, PROJ])
    assert "2 of 2 layers have no alpha, in the file or beside it: their rank is taken for it" in said(peft(made))
    own = kohya(made)
    assert said(own) == said(peft(made), lora_alpha="16") == ""
    del own[next(key for key in own if key.endswith(".alpha"))]
    assert "1 of 2 layers have no alpha" in said(own)
