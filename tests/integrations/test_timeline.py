"""Timelines: places and weights, and each model's rule spelled out for a frame at a time."""

import math

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

import diffusers
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from support.tiny_pipelines import motion_unet, unet3d, wan
from vstar_engine.integrations.diffusers import timeline
from vstar_engine.integrations.diffusers.places import frame_weights, latent_weights, relay_bias, split
from vstar_engine.prompting.interpolation import spread
from vstar_engine.prompting.synopsis import Synopsis, synopsize

STATES = ["a boy", (2, "he jumps"), ("100%", "he runs")]


class Pipe:
    """A denoiser with what a timeline takes of a pipeline; its texts are drawn."""

    vae_scale_factor_temporal = 2
    _execution_device = "cpu"

    def __init__(self, name, module, length):
        setattr(self, name, module)
        self.scheduler = diffusers.DDIMScheduler()
        self.scheduler.set_timesteps(4)
        self.length = length

    def encode_prompt(self, prompt, device, do_classifier_free_guidance, negative_prompt):
        torch.manual_seed(len(prompt))
        return torch.randn(len(prompt), self.length, 8), torch.randn(1, self.length, 8).expand(len(prompt), -1, -1)


# --- places ---


@pytest.mark.parametrize("mode", ["linear", "ease", "hold"])
@pytest.mark.parametrize(("count", "frames"), [(1, 4), (3, 3), (3, 16), (4, 17)])
def test_weights_are_the_synopsis_prompting_of_the_engine(mode, count, frames):
    weights = frame_weights([], count, frames, 8.0, None, mode)
    one_hot = torch.eye(count)[:, None]
    torch.testing.assert_close(weights, spread(one_hot, frames, mode)[:, 0])


def test_places_are_frames_shares_and_seconds():
    texts, places = split(["x", (0.5, "y"), ("1.5s", "z")])
    assert (texts, places) == (["x", "y", "z"], [0, 0.5, "1.5s"])
    assert split(Synopsis("", ("x", "y"), at=(0, 12))) == (["x", "y"], [0, 12])
    assert split(synopsize("a tree from spring to winter"))[1] == []
    weights = frame_weights(places, 3, 17, 8.0, None, "linear")
    assert weights[[0, 8, 12, 16]].argmax(1).tolist() == [0, 1, 2, 2]
    assert weights[[0, 8, 12, 16]].max(1).values.tolist() == [1.0] * 4
    # the change takes two frames, and is done at its place
    ramped = frame_weights([0, 8, "1.5s"], 3, 17, 8.0, "0.25s", "linear")
    assert ramped[:, 1].tolist() == [0.0] * 7 + [0.5, 1.0, 1.0, 1.0, 0.5] + [0.0] * 5
    assert frame_weights([0, 8], 2, 17, 8.0, 0, "linear")[:, 1].tolist() == [0.0] * 8 + [1.0] * 9


def test_a_latent_frame_has_the_mean_of_its_frames():
    weights = torch.tensor([[1.0, 0.0], [0.8, 0.2], [0.4, 0.6], [0.0, 1.0], [0.0, 1.0]])
    torch.testing.assert_close(latent_weights(weights, 3), torch.tensor([[1.0, 0.0], [0.6, 0.4], [0.0, 1.0]]))
    assert latent_weights(weights, 5) is weights


def test_relay_is_flat_around_a_segments_middle_and_steep_beyond():
    bias = relay_bias([0, 8], 16)
    sigma = 1 / math.log(1000)
    assert bias[2:6, 0].tolist() == [0.0] * 4
    assert float(bias[6, 0]) == pytest.approx(-(0.5**2) / (2 * sigma**2))
    assert float(bias[15, 0]) == pytest.approx(-(9.5**2) / (2 * sigma**2))


@pytest.mark.parametrize(
    ("states", "options", "match"),
    [
        ("a boy", {}, "a timeline is a list of states"),
        (["x", (2, "y"), "z"], {}, "give every state but the first a place, or none"),
        (["x", "y"], {"rule": "other"}, "rule must be one of mix, relay"),
        (["x", "y"], {"rule": "relay"}, "relay biases a transformer's attention"),
    ],
)
def test_refusals(states, options, match):
    with pytest.raises(ValueError, match=match):
        timeline(Pipe("unet", unet3d(), 7), states, **options)


def test_places_that_do_not_ascend_are_refused():
    for places, options, match in (
        ([3, 5], {}, "must ascend from 0"),
        ([0, "4s"], {}, "must ascend from 0"),
        ([0, "xs"], {}, "a place in seconds is a number such as"),
        ([0, 2], {"transition": "soon"}, "a transition is frames such as 5"),
    ):
        with pytest.raises(ValueError, match=match):
            frame_weights(places, 2, 8, 8.0, options.get("transition"), "linear")


# --- models ---


def run(model, latents, pipe, text):
    with torch.no_grad():
        return model(latents, pipe.scheduler.timesteps[0].expand(len(latents)), text).sample


class TextOfFrames:
    """Attention to text with a row of `texts` for each frame, logits spelled out."""

    def __init__(self, texts):
        self.texts = texts

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        rows = []
        for row, x in enumerate(hidden_states):
            text = self.texts[row // self.texts.shape[1], row % self.texts.shape[1]]
            q, k, v = (
                y.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for y in (attn.to_q(x), attn.to_k(text), attn.to_v(text))
            )
            rows.append(((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1).flatten(1))
        return attn.to_out[0](torch.stack(rows))


def spread_rows(text, frames, places):
    """Interpolates each video's states (videos, 3 * L, C) over the frames: (videos, frames, L, C)."""
    return torch.stack([spread(row.unflatten(0, (3, -1)), frames, at=places) for row in text])


def test_a_unet_has_a_text_for_each_frame():
    """Guidance in a batch: the first video's states are the negative's."""
    model, latents = unet3d(), torch.randn(2, 4, 5, 8, 8)
    pipe = Pipe("unet", model, 7)
    before = dict(model.attn_processors)
    with timeline(pipe, STATES) as on:
        texts = on.texts("blurry")
        text = torch.cat([texts["negative_prompt_embeds"], texts["prompt_embeds"]])
        assert text.shape == (2, 21, 8)
        ours = run(model, latents, pipe, text)
        split_calls = torch.cat([run(model, latents[i : i + 1], pipe, text[i : i + 1]) for i in range(2)])
        with pytest.raises(ValueError, match="was called with one text of 7 tokens"):
            run(model, latents, pipe, text[:, :7])
    assert all(model.attn_processors[name] is kept for name, kept in before.items())
    dense = TextOfFrames(spread_rows(text, 5, [0, 2, 4]))
    is_text = {name: ".attentions." in name and ".attn2." in name for name in before}
    model.set_attn_processor({name: dense if is_text[name] else AttnProcessor2_0() for name in before})
    exact = run(model, latents, pipe, text[:, :7])
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(split_calls, exact, rtol=0, atol=1e-5)


def test_a_motion_model_takes_its_texts_by_frames():
    model, latents = motion_unet(), torch.randn(2, 4, 5, 8, 8)
    pipe = Pipe("unet", model, 7)
    with timeline(pipe, STATES) as on:
        texts = on.texts("blurry")
        text = torch.cat([texts["negative_prompt_embeds"], texts["prompt_embeds"]])
        ours = run(model, latents, pipe, text.repeat_interleave(5, dim=0))
    own = spread_rows(text, 5, [0, 2, 4]).flatten(0, 1)
    torch.testing.assert_close(ours, run(model, latents, pipe, own), rtol=0, atol=1e-6)


class MixedStates:
    """Wan's attention to text, a frame at a time: mixed keys and values, or all states' with biased logits."""

    def __init__(self, weights, bias, tokens):
        self.weights, self.bias, self.tokens = weights, bias, tokens

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        frames, states = self.weights.shape
        heads = (attn.heads, -1)
        q = attn.norm_q(attn.to_q(hidden_states))
        k, v = attn.norm_k(attn.to_k(encoder_hidden_states)), attn.to_v(encoder_hidden_states)
        length = k.shape[1] // states
        out = torch.empty_like(q)
        for f in range(frames):
            here = slice(f * self.tokens, (f + 1) * self.tokens)
            if self.bias is None:
                k_f, v_f = (sum(w * x[:, i * length : (i + 1) * length] for i, w in enumerate(self.weights[f])) for x in (k, v))
                added = 0.0
            else:
                k_f, v_f, added = k, v, self.bias[f].repeat_interleave(length)
            q_h, k_h, v_h = (x.unflatten(-1, heads).transpose(1, 2) for x in (q[:, here], k_f, v_f))
            probs = (q_h @ k_h.mT / q_h.shape[-1] ** 0.5 + added).softmax(-1)
            out[:, here] = (probs @ v_h).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


@pytest.mark.parametrize("rule", ["mix", "relay"])
def test_wan_mixes_its_states_by_frame(rule):
    model, latents = wan(), torch.randn(2, 4, 9, 4, 4)
    pipe = Pipe("transformer", model, 6)
    with timeline(pipe, ["a boy", (7, "he jumps"), (12, "he runs")], rule=rule) as on:
        texts = on.texts("blurry")
        text = torch.cat([texts["prompt_embeds"], texts["negative_prompt_embeds"]])
        ours, weights = run(model, latents, pipe, text), on.weights(9)
        bias = on.bias(9) if rule == "relay" else None
        assert ("relay" in str(on.report())) == (rule == "relay")
    assert weights.shape == (9, 3)
    torch.testing.assert_close(weights.sum(1), torch.ones(9))
    dense = MixedStates(weights, bias, 4)
    model.set_attn_processor({name: dense if ".attn2." in name else WanAttnProcessor() for name in model.attn_processors})
    torch.testing.assert_close(ours, run(model, latents, pipe, text), rtol=0, atol=1e-5)


def test_states_that_are_alike_are_one_text_and_image_tokens_stay():
    """Wan 2.1's image-to-video model, whose text has 512 tokens behind those of the image."""
    torch.manual_seed(0)
    model, latents = wan(image_dim=8, added_kv_proj_dim=24), torch.randn(1, 4, 3, 4, 4)
    pipe = Pipe("transformer", model, 512)
    image = torch.randn(1, 5, 8)

    def call(text):
        with torch.no_grad():
            return model(latents, pipe.scheduler.timesteps[:1], text, encoder_hidden_states_image=image).sample

    text = torch.randn(1, 512, 8)
    plain = call(text)
    with timeline(pipe, ["a boy", "a boy"]) as on:
        on.texts()
        torch.testing.assert_close(call(torch.cat([text, text], dim=1)), plain, rtol=0, atol=1e-5)
