"""A diffusers folder computes what diffusers computes: networks, tokens, and a whole guided sampling."""

from dataclasses import replace
from functools import partial

import pytest

from support import diffusers_folders

# isort: split
import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from vstar_engine import Engine, Sampling
from vstar_engine.config.request import Request
from vstar_engine.networks.vae import Vae
from vstar_engine.prompting.tokenizer import tokenize
from vstar_engine.sampling.schedule import alpha_bar, betas
from vstar_engine.sampling.tar import toeplitz
from vstar_engine.weights.checkpoint import Weights, load
from vstar_engine.weights.convert_child import convert_here
from vstar_engine.weights.diffusers_config import noise_spec

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


# a scheduler of diffusers, what it is changed by, and ours of the same mathematics
SCHEDULERS = {
    "ddim": (DDIMScheduler, {}, {"eta": 0.0}),
    "v": (DDIMScheduler, {"prediction_type": "v_prediction"}, {"eta": 0.0}),
    "offset 0, ends at 1": (DDIMScheduler, {"steps_offset": 0, "set_alpha_to_one": True}, {"eta": 0.0}),
    "other betas": (DDIMScheduler, {"beta_start": 0.001, "beta_end": 0.02}, {"eta": 0.0}),
}
STEPS = 10


def with_noise(engine, scheduler, folder):
    """Returns an engine of the same networks that reads another scheduler's configuration."""
    scheduler.save_pretrained(folder)
    made = Engine.__new__(Engine)
    made.__dict__.update(engine.__dict__)
    made.spec = replace(engine.spec, noise=noise_spec(folder / "scheduler_config.json"))
    return made


def sampled(engine, **sampling):
    """Returns the first latents of a guided video and the finished batch."""
    how = {"frames": 4, "seed": 3, "size": (16, 24), "negative": "snow", "tar": None}
    batch = engine.begin([Request(("a red house",), **how, sampling=Sampling(steps=STEPS, guidance=6.0, **sampling))])
    start = batch.rows[0].latents.clone()
    while batch.done < batch.steps:
        batch.step()
    return start, batch


def theirs(pipe, scheduler, start, output):
    """Returns what their pipeline makes of the same noise."""
    before, pipe.scheduler = pipe.scheduler, scheduler
    how = {"height": 16, "width": 24, "num_frames": 4, "num_inference_steps": STEPS, "guidance_scale": 6.0}
    try:
        return pipe("a red house", negative_prompt="snow", latents=start, output_type=output, **how).frames
    finally:
        pipe.scheduler = before


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_guided_sampling_is_theirs(pipe, engine, tmp_path, name):
    kind, changed, sampling = SCHEDULERS[name]
    scheduler = kind(**{**diffusers_folders.SCHEDULER, **changed})
    engine = with_noise(engine, scheduler, tmp_path)
    start, batch = sampled(engine, **sampling)
    assert close(batch.rows[0].latents, theirs(pipe, scheduler, start, "latent"), LATENTS_CLOSE)
    if name == "ddim":
        frames = theirs(pipe, scheduler, start, "np")[0]
        made = engine.finish(batch, batch.rows[0]).frames
        assert abs(made.astype(int) - (frames * 255).astype(int)).max() <= 1


def at_our_timesteps(scheduler, schedule):
    """Has a scheduler of theirs go through our timesteps and end at the least noise there is: its own spacing differs."""
    order, levels = schedule.timesteps[::-1].copy(), np.sqrt((1 - alpha_bar()) / alpha_bar())
    usual = scheduler.set_timesteps

    def set_timesteps(steps, device=None):
        usual(steps, device=device)
        scheduler.timesteps = torch.from_numpy(order)
        scheduler.sigmas = torch.from_numpy(np.append(levels[order], levels[0]).astype(np.float32))

    scheduler.set_timesteps = set_timesteps
    return scheduler


@pytest.mark.parametrize("sampler", ["dpm++2m", "unipc"])
def test_a_guided_sampling_by_a_solver_is_theirs(pipe, engine, sampler):
    common = {"trained_betas": betas().astype(np.float32), "final_sigmas_type": "sigma_min"}
    kind = {"unipc": UniPCMultistepScheduler, "dpm++2m": partial(DPMSolverMultistepScheduler, euler_at_final=True)}[sampler]
    start, batch = sampled(engine, sampler=sampler)
    scheduler = at_our_timesteps(kind(**common), batch.rows[0].schedule)
    assert close(batch.rows[0].latents, theirs(pipe, scheduler, start, "latent"), LATENTS_CLOSE)
