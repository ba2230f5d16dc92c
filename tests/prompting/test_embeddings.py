"""Bundles of embeddings: portable, refused where they do not belong, and as good as the text tower."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vstar_engine import Engine, Sampling
from vstar_engine.commands.main import main
from vstar_engine.config.models import MODELS
from vstar_engine.errors import CheckpointError
from vstar_engine.machine import memory
from vstar_engine.prompting.embeddings import KIND, Embeddings, embed
from vstar_engine.prompting.synopsis import Synopsis
from vstar_engine.prompting.tokenizer import tokenizer_hash
from vstar_engine.weights import checkpoint, key_map

SMALL = {"frames": 4, "size": (32, 32), "sampling": Sampling(steps=2)}
SYNOPSIS = Synopsis("p", ("snow", "flowers"), "offline")


def made(engine, *synopses, **settings):
    return list(embed(synopses, engine.embed, engine.text_hash, **settings))


@pytest.fixture(scope="module")
def bare(mini_weights):
    """An engine whose text tower was never loaded."""
    return Engine.load("mini", mini_weights, text=None)


@pytest.fixture
def bundle(mini, tmp_path):
    (bundle,) = made(mini, SYNOPSIS)
    return bundle.save(tmp_path / "b.safetensors")


def altered(path, tensors=None, kind=KIND, **about):
    """Writes a bundle again with something changed."""
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["about"])
    save_file({**load_file(path), **(tensors or {})}, path, {"kind": kind, "about": json.dumps({**content, **about})})
    return path


@pytest.mark.parametrize(
    "synopsis",
    [SYNOPSIS, Synopsis("p", ("a", "b"), at=(0, 1.0)), Synopsis("ü", ("a", "b"), durations=(1.0, 2.0), negatives=("x", "y"))],
    ids=["plain", "positions", "durations and negatives"],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_is_written_reads_back(mini, tmp_path, synopsis, dtype):
    (bundle,) = made(mini, synopsis, dtype=dtype)
    read = Embeddings.read(bundle.save(tmp_path / "b.safetensors"))
    assert read.synopsis == synopsis
    assert torch.equal(read.anchors, mini.embed(synopsis.states).to(dtype))
    assert torch.equal(read.negative, mini.embed(synopsis.negatives or [""]).to(dtype))
    assert (read.text_hash, read.tokenizer_hash) == (mini.text_hash, tokenizer_hash())


@pytest.mark.parametrize(
    ("synopsis", "settings"),
    [
        (SYNOPSIS, {}),
        (Synopsis("p", ("snow", "flowers"), at=(0, 3)), {"at": (0, 3)}),
        (Synopsis("p", ("snow", "rain"), negatives=("sun", "night")), {"negatives": ("sun", "night")}),
    ],
    ids=["plain", "positions", "negatives"],
)
def test_without_the_text_tower_the_video_is_the_same(mini, bare, tmp_path, synopsis, settings):
    assert bare.text is None
    (bundle,) = made(mini, synopsis, dtype=torch.float32)
    ours = bare.generate(Embeddings.read(bundle.save(tmp_path / "b.safetensors")), **SMALL)
    assert np.array_equal(ours.frames, mini.generate(synopsis.states, **SMALL, **settings).frames)
    assert ours.provenance["embeddings"] == str(tmp_path / "b.safetensors")


def test_float16_is_near_and_one_bundle_serves_any_length(mini, bare, bundle):
    read = Embeddings.read(bundle)
    for frames in (2, 5):
        ours = bare.generate(read, **{**SMALL, "frames": frames})
        exact = mini.generate(SYNOPSIS.states, **{**SMALL, "frames": frames})
        # float16 moves an embedding by at most 2^-11 of itself, a byte here by a rounding step
        assert np.abs(ours.frames.astype(int) - exact.frames.astype(int)).mean() < 1.0


def test_without_a_text_tower_words_are_refused(bare):
    with pytest.raises(ValueError, match="loaded without its text tower"):
        bare.generate("snow", **SMALL)
    with pytest.raises(ValueError, match="'weights' or None"):
        Engine.load("mini", text="elsewhere")


def test_embeddings_bring_their_negative_prompt(bare, bundle):
    with pytest.raises(ValueError, match="bring their negative prompt"):
        bare.generate(Embeddings.read(bundle), negative="rain", **SMALL)


def test_the_text_towers_name_does_not_depend_on_how_it_is_stored(mini, mini_weights):
    tensors, text = checkpoint.Weights(mini_weights), MODELS["mini"].text
    widened = {name: tensors[name].float() for name in tensors if name.startswith(key_map.TEXT)}
    assert checkpoint.text_hash(widened, text) == mini.text_hash
    widened[key_map.TEXT + "ln_final.bias"][0] += 1
    assert checkpoint.text_hash(widened, text) != mini.text_hash
    assert checkpoint.text_hash({}, text) is None


def test_weights_without_a_text_tower_serve_embeddings(mini, mini_weights, bundle, tmp_path, caplog):
    tensors = checkpoint.Weights(mini_weights)
    save_file({name: tensors[name] for name in tensors if not name.startswith(key_map.TEXT)}, tmp_path / "w.safetensors")
    engine = Engine.load("mini", tmp_path / "w.safetensors", text=None)
    ours = engine.generate(Embeddings.read(bundle), **SMALL)
    assert "could not be compared" in caplog.text
    assert np.array_equal(ours.frames, mini.run(request_of(bundle), embeddings=Embeddings.read(bundle)).frames)
    with pytest.raises(CheckpointError, match="tensors are missing"):
        Engine.load("mini", tmp_path / "w.safetensors")


def request_of(bundle):
    from vstar_engine.config.request import Request

    return Request(Embeddings.read(bundle).synopsis.states, **SMALL)


def test_a_request_for_other_states_is_refused(mini, bundle):
    from vstar_engine.config.request import Request

    with pytest.raises(ValueError, match="not those of the embeddings"):
        mini.run(Request(("snow", "rain"), **SMALL), embeddings=Embeddings.read(bundle))


BAD = {
    "another text tower": ({"text_sha256": "0" * 64}, "another text tower"),
    "another tokenizer": ({"tokenizer_sha256": "0" * 64}, "another tokenizer"),
    "another width": ({"tensors": {"anchors": torch.ones(2, 77, 32), "negative": torch.ones(1, 77, 32)}}, r"\(77, 64\)"),
    "another version": ({"version": 2}, "version 2; this engine reads 1"),
    "another kind": ({"kind": "weights"}, "no bundle of embeddings"),
    "fewer anchors": ({"tensors": {"anchors": torch.ones(1, 77, 64)}}, "anchors of 2 states"),
    "another negative": ({"tensors": {"negative": torch.ones(1, 77, 32)}}, "negative of 2 states"),
    "flat anchors": ({"tensors": {"anchors": torch.ones(2, 77)}}, "anchors of 2 states"),
    "NaN": ({"tensors": {"anchors": torch.full((2, 77, 64), torch.nan)}}, "finite"),
    "whole numbers": ({"tensors": {"anchors": torch.ones(2, 77, 64, dtype=torch.int32)}}, "finite"),
    "no states": ({"states": []}, "damaged bundle"),
    "numbers for states": ({"states": [1, 2]}, "damaged bundle"),
    "texts for positions": ({"positions": ["a", "b"]}, "damaged bundle"),
    "positions missing": ({"positions": None}, "damaged bundle"),
}


@pytest.mark.parametrize(("change", "complaint"), BAD.values(), ids=BAD.keys())
def test_bundles_that_do_not_belong_here(bare, bundle, change, complaint):
    altered(bundle, **change)
    with pytest.raises(CheckpointError, match=complaint):
        bare.generate(Embeddings.read(bundle), **SMALL)


@pytest.mark.parametrize("length", [0, 4, 100, 5000], ids="{} bytes".format)
def test_a_truncated_bundle(bundle, length):
    bundle.write_bytes(bundle.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="not a whole bundle"):
        Embeddings.read(bundle)


def test_no_bundle_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="not a whole bundle"):
        Embeddings.read(tmp_path / "nowhere")


def test_texts_are_encoded_once_in_batches_as_prompts_come():
    batches, taken = [], []

    def encode(texts):
        batches.append(list(texts))
        return torch.tensor([[[float(len(text))]] for text in texts])

    def endless():
        for i in range(10**6):
            taken.append(i)
            yield Synopsis("p", ("start", "x" * i))

    stream = embed(endless(), encode, "hash", negative="no", batch=4)
    first = next(stream)
    assert batches == [["no"], ["start", "", "x", "xx"]]
    assert len(taken) == 3
    assert first.anchors.flatten().tolist() == [5, 0]
    assert [next(stream).anchors.flatten().tolist() for _ in range(3)] == [[5, 1], [5, 2], [5, 3]]
    assert len(taken) == 6


def test_a_general_negative_stands_in_for_states_without_one(mini):
    with_own, without = made(mini, Synopsis("p", ("a", "b"), negatives=("x", "")), SYNOPSIS, negative="rain")
    assert with_own.synopsis.negatives == ("x", "rain")
    assert with_own.negative_prompt == ""
    assert without.negative_prompt == "rain"
    assert without.synopsis.negatives == ()


def test_the_text_tower_is_not_counted_where_it_is_not_loaded():
    spec = MODELS["videocrafter2"]
    saved = memory.weight_bytes(spec, torch.float16) - memory.weight_bytes(spec, torch.float16, text=False)
    with torch.device("meta"):
        from vstar_engine.networks.text_encoder import TextTower

        assert saved == 2 * sum(parameter.numel() for parameter in TextTower(spec.text).parameters())


def test_a_batch_without_texts_is_refused_before_a_folder_is_made(tmp_path, capsys):
    out = tmp_path / "bundles"
    assert main(["embed", "snow", "--model", "mini", "--batch", "0", "--out", str(out)]) == 2
    assert "a batch holds at least 1 text, got 0" in capsys.readouterr().err
    assert not out.exists()
