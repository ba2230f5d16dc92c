"""Every form in which diffusers folders lie about is read to the same tensors, and what is not computed is refused by name."""

import json
import shutil

import pytest

from support import diffusers_folders

# isort: split
import torch
from safetensors.torch import load_file, save_file

from vstar_engine import Engine
from vstar_engine.config.models import MODELS
from vstar_engine.errors import CheckpointError
from vstar_engine.prompting.tokenizer import TRANSFORMERS_SPECIAL, merges, vocabulary
from vstar_engine.weights import diffusers_files, hub
from vstar_engine.weights.convert import convert
from vstar_engine.weights.convert_child import convert_here
from vstar_engine.weights.diffusers_layout import open_layout
from vstar_engine.weights.diffusers_names import OLD_ATTENTION_VAE
from vstar_engine.weights.unet_alone import completed

BASE = MODELS["modelscope"]
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture(scope="module")
def pipe():
    return diffusers_folders.pipeline()


@pytest.fixture(scope="module")
def today(pipe, tmp_path_factory):
    return diffusers_folders.saved(pipe, tmp_path_factory.mktemp("layouts") / "today")


@pytest.fixture(scope="module")
def tensors(today):
    return dict(open_layout(today, BASE)[1])


@pytest.fixture
def folder(today, tmp_path):
    return shutil.copytree(today, tmp_path / "folder")


def as_in_2023(folder, pickled):
    """Renames a folder of today to what diffusers 0.15 and transformers 4 wrote, in safetensors or pickles."""
    for part, stem in WEIGHTS.items():
        tensors = load_file(folder / part / f"{stem}.safetensors")
        if part == "vae":
            tensors = {old_attention(name): tensor for name, tensor in tensors.items()}
        if part == "text_encoder":
            tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        (folder / part / f"{stem}.safetensors").unlink()
        if pickled:
            torch.save(tensors, folder / part / f"{'pytorch_model' if part == 'text_encoder' else stem}.bin")
        else:
            save_file(tensors, folder / part / f"{stem}.safetensors")
        halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        save_file(halves, folder / part / f"{stem}.fp16.safetensors")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary(TRANSFORMERS_SPECIAL)))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges())]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    token = {"content": "<|startoftext|>", "lstrip": False, "normalized": True}
    special = {"bos_token": token, "eos_token": {**token, "content": "<|endoftext|>"}, "pad_token": "!"}
    (folder / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 77, "pad_token": "<|endoftext|>"})
    )


def old_attention(name):
    for new, old in OLD_ATTENTION_VAE.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name


def same(folder, tensors):
    spec, found = open_layout(folder, BASE)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert spec.text.pad == 0


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_a_folder_of_2023_is_read(folder, tensors, pickled):
    as_in_2023(folder, pickled)
    same(folder, tensors)


def test_weights_in_several_files_are_read(pipe, folder, tensors):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    pipe.unet.save_pretrained(folder / "unet", max_shard_size="1MB")
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    same(folder, tensors)
    next((folder / "unet").glob("*-00001-of-*")).unlink()
    with pytest.raises(CheckpointError, match=r"is missing, though diffusion_pytorch_model.safetensors.index.json names it"):
        open_layout(folder, BASE)


def test_half_precision_alone_is_read(folder, tensors):
    as_in_2023(folder, pickled=False)
    for part, stem in WEIGHTS.items():
        (folder / part / f"{stem}.safetensors").unlink()
    _, found = open_layout(folder, BASE)
    assert all(found[name].dtype == torch.float16 and torch.equal(found[name], tensors[name].half()) for name in tensors)


def test_half_precision_of_several_files_is_found_by_name():
    names = ["unet/diffusion_pytorch_model.safetensors.index.fp16.json", "unet/diffusion_pytorch_model.safetensors"]
    snapshot = hub.Snapshot(hub.HubId("a/b"), "c", dict.fromkeys(names, 1))
    assert snapshot._part("unet/", diffusers_files.UNET, half=True) == names[:1]
    assert snapshot._part("unet/", diffusers_files.UNET, half=False) == names[1:]


def test_a_pickle_that_would_run_code_is_refused(folder):
    as_in_2023(folder, pickled=True)
    torch.save({"a": print}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds something other than tensors, which is never executed"):
        open_layout(folder, BASE)


def test_a_dangling_link_says_that_its_download_is_not_finished(folder):
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.symlink_to("../../blobs/none")
    with pytest.raises(CheckpointError, match="is a link to a file that is not there: its download has not finished"):
        open_layout(folder, BASE)


REFUSED = {
    "unet norm": ("unet/config.json", {"norm_eps": 1e-6}, r"unet/config.json asks for norm_eps = 1e-06.*1e-05 is"),
    "unet setting": ("unet/config.json", {"motion_max_seq_length": 32}, "asks for motion_max_seq_length, which is not known"),
    "unet class": (
        "unet/config.json",
        {"_class_name": "UNetMotionModel"},
        "describes UNetMotionModel; UNet3DConditionModel and",
    ),
    "unet blocks": ("unet/config.json", {"up_block_types": ["UpBlock3D"] * 2}, r"each of the 2 levels is .*got CrossAttnDown"),
    "unet heads": ("unet/config.json", {"attention_head_dim": [8, 8]}, r"attention_head_dim must be of the kind of 64"),
    "vae": ("vae/config.json", {"shift_factor": 0.1}, "asks for shift_factor = 0.1, which is not computed here; None is"),
    "vae class": ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "describes AutoencoderTiny; AutoencoderKL is read"),
    "text": ("text_encoder/config.json", {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu', which is not computed here"),
    "tokenizer": ("tokenizer/tokenizer_config.json", {"model_max_length": 248}, "model_max_length must be 77, got 248"),
    "padding": ("tokenizer/tokenizer_config.json", {"pad_token": "[PAD]"}, r"padding token '\[PAD\]' is none of CLIP's"),
    "added token": (
        "tokenizer/tokenizer_config.json",
        {"added_tokens_decoder": {"0": {"content": "!"}}, "pad_token": "<|endoftext|>"},
        "adds the token '!' to CLIP's",
    ),
    "betas": ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule = 'linear'.*'scaled_linear' is"),
    "clip": ("scheduler/scheduler_config.json", {"clip_sample": True}, "asks for clip_sample = True"),
    "sample": (
        "scheduler/scheduler_config.json",
        {"prediction_type": "sample"},
        "must be epsilon or v_prediction, got 'sample'",
    ),
    "pipeline": ("model_index.json", {"_class_name": "AnimateDiffPipeline"}, "is a AnimateDiffPipeline; TextToVideoSDPipeline"),
    "part": ("model_index.json", {"image_encoder": ["transformers", "CLIPVision"]}, "not computed here: image_encoder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_name(folder, name):
    file, change, said = REFUSED[name]
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **change}))
    with pytest.raises(CheckpointError, match=said):
        open_layout(folder, BASE)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("unet", lambda tensors: tensors.pop("conv_in.bias"), r"unet does not fit .*1 tensors are missing \(conv_in.bias\)"),
        ("vae", lambda tensors: tensors.update(extra=torch.zeros(1)), r"vae does not fit .*1 are unknown \(extra\)"),
        ("unet", lambda tensors: tensors.update({"conv_in.bias": torch.zeros(3)}), r"conv_in.bias is \(3,\), wanted \(16,\)"),
    ],
)
def test_every_tensor_has_its_place(folder, part, change, said):
    path = folder / part / f"{WEIGHTS[part]}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=said):
        open_layout(folder, BASE)


def test_the_folder_of_another_model_is_named(today):
    with pytest.raises(CheckpointError, match=r"model videocrafter2 has a frame-rate condition, and \S+ has none"):
        open_layout(today, MODELS["videocrafter2"])


def test_a_folder_of_something_else_is_named(tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match=r"is a folder without model_index\.json"):
        convert(tmp_path / "other", tmp_path / "out", "modelscope")


@pytest.fixture(scope="module")
def alone(pipe, tmp_path_factory):
    """A VideoCrafter2 UNet at the root of a folder, as UNet3DVideoCrafterConditionModel, with a frame-rate embedding."""
    folder = tmp_path_factory.mktemp("alone")
    pipe.unet.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"_class_name": "UNet3DVideoCrafterConditionModel", "fps_cond": True}
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    more = {
        name.replace("time_", "fps_"): torch.randn_like(tensor) for name, tensor in tensors.items() if "time_embedding" in name
    }
    save_file({**tensors, **more}, path)
    return folder


def test_a_unet_alone_is_accepted_by_its_class(alone, tensors):
    spec, found = open_layout(alone, MODELS["videocrafter2"])
    assert spec.unet.fps_condition
    assert spec.noise.rescale
    unet = {name for name in tensors if name.startswith("model.diffusion_model.")}
    fps = {f"model.diffusion_model.fps_embedding.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")}
    assert found.keys() - unet == fps


def test_an_unknown_embedding_of_the_frame_rate_is_one_sentence(alone, tmp_path):
    folder = shutil.copytree(alone, tmp_path / "other")
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({name.replace("fps_embedding", "fps_embed"): tensor for name, tensor in load_file(path).items()}, path)
    said = r"4 tensors are missing \(fps_embedding\S+.*\); 4 are unknown \(fps_embed\."
    with pytest.raises(CheckpointError, match=said):
        open_layout(folder, MODELS["videocrafter2"])


def test_a_unet_alone_takes_the_rest_from_a_stated_source(alone, today, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds a UNet alone; say where its autoencoder and its text tower come from"):
        completed(*open_layout(alone, MODELS["videocrafter2"]), alone, None)
    for folder in ("whole", "made"):
        (tmp_path / folder).mkdir()
    how = {"dtype": "stored", "shard_bytes": 2**30, "tell": lambda **_: None}
    convert_here(today, tmp_path / "whole", "modelscope", about={}, **how)
    convert_here(alone, tmp_path / "made", "videocrafter2", about={}, parts=str(tmp_path / "whole"), **how)
    engine = Engine.load("videocrafter2", weights=tmp_path / "made")
    assert engine.spec.unet.fps_condition
    assert engine.embed(["snow"]).shape == (1, 77, 32)
