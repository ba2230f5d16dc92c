"""A diffusers folder computes what diffusers computes: networks, tokens, and a whole guided sampling."""

import pytest
import torch

from support import diffusers_folders
from vstar_engine import Engine, Sampling
from vstar_engine.config.request import Request
from vstar_engine.networks.vae import Vae
from vstar_engine.prompting.tokenizer import tokenize
from vstar_engine.sampling.tar import toeplitz
from vstar_engine.weights.checkpoint import Weights, load
from vstar_engine.weights.convert_child import convert_here

# float32 networks of equal mathematics, whose sums run in another order
CLOSE = 1e-5
LATENTS_CLOSE = 1e-4
PROMPTS = [
    "Hi! there  &amp; <|endoftext|> É café x!!",
    "",
    "a " * 100,
    "日本 it's 1234 ... !'s <start_of_text>\n\tok",
    "! !!! hi!",
]


@pytest.fixture(scope="module")
def pipe():
    return diffusers_folders.pipeline()


@pytest.fixture(scope="module")
def converted(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    saved = diffusers_folders.saved(pipe, folder / "saved")
    (folder / "weights").mkdir()
    convert_here(saved, folder / "weights", "modelscope", "stored", 2**30, lambda **_: None, {})
    return folder / "weights"


@pytest.fixture(scope="module")
def engine(converted):
    return Engine.load("modelscope", weights=converted)


def close(ours, theirs, tolerance=CLOSE):
    return float((ours - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("pad", ["!", "<|endoftext|>"])
def test_tokens_are_those_of_transformers(engine, pad):
    theirs = diffusers_folders.tokenizer(pad)
    spec = type(engine.spec.text)(tokenizer="transformers", pad=theirs.pad_token_id)
    wanted = torch.tensor(theirs(PROMPTS, padding="max_length", truncation=True)["input_ids"])
    assert torch.equal(tokenize(PROMPTS, spec), wanted)


def test_text_is_the_last_layer_after_the_final_norm(pipe, engine):
    with torch.inference_mode():
        wanted = pipe.text_encoder(torch.tensor(pipe.tokenizer(PROMPTS, padding="max_length", truncation=True)["input_ids"]))
    assert close(engine.embed(PROMPTS), wanted[0])


@pytest.mark.parametrize(("frames", "height", "width"), [(5, 8, 8), (1, 4, 6)])
def test_the_unet_predicts_what_theirs_does(pipe, engine, frames, height, width):
    x, context = torch.randn(2, 4, frames, height, width), torch.randn(2, 77, 32)
    time, tar = torch.tensor([[481], [41]]), torch.zeros(1, 2, frames)
    with torch.inference_mode():
        wanted = pipe.unet(x, time[:, 0], context).sample
        ours = engine.denoiser.module(x, time, context[:, None], torch.full((2,), 8), tar)
    assert close(ours, wanted)


def test_the_autoencoder_decodes_and_encodes_what_theirs_does(pipe, converted, engine):
    vae = load_vae(engine, converted)
    latents, pixels = torch.randn(3, 4, 4, 6), torch.randn(2, 3, 8, 12)
    with torch.inference_mode():
        decoded = vae.decode(latents.transpose(0, 1)[None] * vae.spec.scale_factor)[0].transpose(0, 1)
        assert close(decoded, pipe.vae.decode(latents).sample)
        assert close(vae.posterior(pixels)[0], pipe.vae.encode(pixels).latent_dist.mean)


def load_vae(engine, converted):
    vae = Vae(engine.spec.vae)
    load(vae, Weights(converted), "first_stage_model.")
    return vae.eval()


class TemporalAttention:
    """An attention processor of diffusers that adds m_i g[|i-j|] to the logits (arXiv 2403.13501, eq. 3)."""

    def __init__(self, g):
        self.g = g

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        q, k, v = (attn.head_to_batch_dim(part(hidden_states)).double() for part in (attn.to_q, attn.to_k, attn.to_v))
        logits = q @ k.mT * attn.scale
        i = torch.arange(logits.shape[-1])
        logits = logits + logits.amax(-1, keepdim=True) * self.g[(i[:, None] - i).abs()]
        out = (logits.softmax(-1) @ v).float()
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(out)))


def test_tar_is_the_formula_in_a_processor_of_theirs(pipe, engine):
    x, context, g = torch.randn(1, 4, 6, 8, 8), torch.randn(1, 77, 32), toeplitz(6, 1.5)
    usual = pipe.unet.attn_processors
    # level 0 has the only temporal transformers of the blocks; the stem's is never regularised
    level = {name: TemporalAttention(g) for name in usual if "temp_attentions" in name and "mid_block" not in name}
    pipe.unet.set_attn_processor({**usual, **level})
    try:
        with torch.inference_mode():
            wanted = pipe.unet(x, 481, context).sample
    finally:
        pipe.unet.set_attn_processor(usual)
    tar = torch.stack([g, torch.zeros(6)])[None]
    with torch.inference_mode():
        ours = engine.denoiser.module(x, torch.tensor([[481]]), context[:, None], torch.full((1,), 8), tar)
        plain = engine.denoiser.module(x, torch.tensor([[481]]), context[:, None], torch.full((1,), 8), torch.zeros_like(tar))
    assert close(ours, wanted)
    assert not close(plain, wanted, 1e-3)


SCHEDULERS = {
    "published": {},
    "v": {"prediction_type": "v_prediction"},
    "offset 0, ends at 1": {"steps_offset": 0, "set_alpha_to_one": True},
    "other betas": {"beta_start": 0.001, "beta_end": 0.02},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_guided_sampling_is_theirs(pipe, engine, tmp_path, name):
    from dataclasses import replace

    from diffusers import DDIMScheduler

    from vstar_engine.weights.diffusers_config import noise_spec

    scheduler = DDIMScheduler(**{**diffusers_folders.SCHEDULER, **SCHEDULERS[name]})
    scheduler.save_pretrained(tmp_path)
    ours = Engine.__new__(Engine)
    ours.__dict__.update(engine.__dict__)
    ours.spec = replace(engine.spec, noise=noise_spec(tmp_path / "scheduler_config.json"))
    request = Request(
        ("a red house",),
        frames=4,
        seed=3,
        size=(16, 24),
        negative="snow",
        tar=None,
        sampling=Sampling(steps=10, eta=0.0, guidance=6.0),
    )
    batch = ours.begin([request])
    start = batch.rows[0].latents.clone()
    while batch.done < batch.steps:
        batch.step()
    before, pipe.scheduler = pipe.scheduler, scheduler
    how = {"negative_prompt": "snow", "num_inference_steps": 10, "guidance_scale": 6.0, "latents": start}
    wanted = pipe("a red house", height=16, width=24, num_frames=4, output_type="latent", **how).frames
    pipe.scheduler = before
    assert close(batch.rows[0].latents, wanted, LATENTS_CLOSE)
    if name == "published":
        frames = pipe("a red house", height=16, width=24, num_frames=4, output_type="np", **how).frames[0]
        made = ours.finish(batch, batch.rows[0]).frames
        assert abs(made.astype(int) - (frames * 255).astype(int)).max() <= 1
