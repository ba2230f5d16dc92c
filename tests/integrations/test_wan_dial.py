"""Dials on Wan's self-attentions, against each method's rule spelled out densely."""

import math

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

import diffusers
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from support.tiny_pipelines import wan
from vstar_engine.config.sampling import Tar
from vstar_engine.integrations.diffusers import DialSettings, dial
from vstar_engine.integrations.diffusers.segments import attend_by, by_segments, segments_of
from vstar_engine.kernels.frame_attention import frame_attention_ref
from vstar_engine.kernels.problems import FrameTables

FRAMES, TOKENS = 5, 4


class DenseRule:
    """Wan's self-attention with N x N logits that `change` makes others of; `factor` is of q, k and the plain logits."""

    def __init__(self, change, factor=lambda q, k: 1.0):
        self.change, self.factor = change, factor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
        angle = torch.complex(rotary_emb[0][..., 0::2].double(), rotary_emb[1][..., 1::2].double())
        q, k = (
            torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * angle).flatten(-2).float()
            for x in (q, k)
        )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        logits = self.change(q @ k.mT / math.sqrt(q.shape[-1]))
        out = (logits.softmax(-1) @ v) * self.factor(q, k)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def frames_of(n):
    f = torch.arange(n) // TOKENS
    return f[:, None], f


def reference(s):
    f_q, f_k = frames_of(s.shape[-1])
    return s + math.log(0.6) * ((f_q > 0) & (f_k == 0))


def ultravico(s, decay=0.9, trained=3):
    n = torch.arange(s.shape[-1])
    far = (n[:, None] - n).abs() > trained * TOKENS / 2
    s = torch.where(far & (s > 0), decay * s, s)
    f_q, f_k = frames_of(len(n))
    return torch.where((f_q == 0) & (f_k > trained), -1e4, s)


def tar(s, sigma=1.5):
    f_q, f_k = frames_of(s.shape[-1])
    return s + s.amax(-1, keepdim=True) * torch.exp(-((f_q - f_k) ** 2) / (2 * sigma**2))


def enhanced(q, k, weight=4.0):
    """Of each video: max(1, mean off-diagonal of softmax over frames * (F + weight))."""
    q, k = (x.unflatten(2, (FRAMES, TOKENS)).transpose(2, 3) for x in (q, k))
    probs = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    mean = probs[..., ~torch.eye(FRAMES, dtype=bool)].mean((1, 2, 3))
    return (mean * (FRAMES + weight)).clamp(min=1.0)[:, None, None, None]


RULES = {
    "reference": ({"reference": 0.6}, DenseRule(reference)),
    "reference by segments": ({"reference": 0.6, "by": "segments"}, DenseRule(reference)),
    "ultravico": ({"decay": 0.9, "trained_frames": 3}, DenseRule(ultravico)),
    "tar": ({"tar": Tar({0: 1.5}, until_step=9)}, DenseRule(tar)),
    "enhance": ({"enhance": 4.0}, DenseRule(lambda s: s, enhanced)),
    "all": (
        {"reference": 0.6, "decay": 0.9, "trained_frames": 3, "enhance": 4.0},
        DenseRule(lambda s: reference(ultravico(s)), enhanced),
    ),
}


@pytest.fixture(scope="module")
def scheduler():
    made = diffusers.FlowMatchEulerDiscreteScheduler()
    made.set_timesteps(10)
    return made


def given(videos=2, frames=FRAMES):
    torch.manual_seed(1)
    return torch.randn(videos, 4, frames, 4, 4), torch.randn(videos, 6, 8)


def run(model, latents, timestep, text):
    with torch.no_grad():
        return model(latents, timestep.expand(len(latents)), text).sample


def spelled_out(model, rule):
    model.set_attn_processor({name: rule if ".attn1." in name else WanAttnProcessor() for name in model.attn_processors})


@pytest.mark.parametrize("name", RULES)
def test_the_rule(name, scheduler):
    """Two prompts in a batch, odd frame counts, guidance batched and split."""
    settings, rule = RULES[name]
    model = wan()
    latents, text = given()
    early, late = scheduler.timesteps[2], scheduler.timesteps[3]
    plain = run(model, latents, early, text), run(model, latents, late, text)
    before = dict(model.attn_processors)
    with dial(model, **settings, until=0.3, scheduler=scheduler) as on:
        ours = run(model, latents, early, text)
        split = torch.cat([run(model, latents[i : i + 1], early, text[i : i + 1]) for i in range(2)])
        assert torch.equal(run(model, latents, late, text), plain[1])
        assert len(on.report().layers) == 2
    assert all(model.attn_processors[path] is processor for path, processor in before.items())
    assert torch.equal(run(model, latents, early, text), plain[0])
    spelled_out(model, rule)
    dense = run(model, latents, early, text)
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-5)
    torch.testing.assert_close(split, dense, rtol=0, atol=1e-5)
    assert (ours - plain[0]).abs().max() > 1e-4


def test_riflex_lowers_one_frequency_of_time(scheduler):
    """theta_k becomes 0.9 * 2 pi / L, for time alone, where the period is shorter than L frames."""
    model = wan()
    latents, text = given(frames=9)
    rope = model.rope
    cos, sin = rope(latents)
    with dial(model, riflex=1, scheduler=scheduler):
        run(model, latents, scheduler.timesteps[0], text)
        lowered = rope(latents)
    frame = torch.arange(9).repeat_interleave(TOKENS)
    angle = (0.9 * 2 * math.pi / 9) * frame
    torch.testing.assert_close(lowered[0][0, :, 0, :2], angle.cos()[:, None].expand(-1, 2))
    torch.testing.assert_close(lowered[1][0, :, 0, :2], angle.sin()[:, None].expand(-1, 2))
    assert torch.equal(lowered[0][..., 2:], cos[..., 2:])
    assert torch.equal(lowered[1][..., 2:], sin[..., 2:])
    short = given(frames=5)[0]
    with dial(model, riflex=1, scheduler=scheduler):
        assert torch.equal(rope(short)[0], cos[:, : 5 * TOKENS])
    assert torch.equal(rope(latents)[0], cos)


def test_neutral_settings_are_the_original_processors(scheduler):
    model = wan()
    latents, text = given()
    plain = run(model, latents, scheduler.timesteps[0], text)
    # a clip as long as the trained one is left alone
    for neutral in ({}, {"reference": 1.0}, {"decay": 1.0, "trained_frames": 3}, {"decay": 0.9, "trained_frames": FRAMES}):
        with dial(model, **neutral, scheduler=scheduler):
            assert torch.equal(run(model, latents, scheduler.timesteps[0], text), plain)


def test_the_backend_of_the_pipeline_stays_in_force(scheduler):
    model = wan()
    with dial(model, reference=0.5, until=0.0, scheduler=scheduler):
        model.set_attention_backend("_native_math")
        latents, text = given()
        run(model, latents, scheduler.timesteps[0], text)
    assert {str(p._attention_backend.value) for p in model.attn_processors.values()} == {"_native_math"}


def test_refusals(scheduler):
    def refuse(model, match, **options):
        with pytest.raises(ValueError, match=match):
            dial(model, **{"reference": 0.5, "scheduler": scheduler, **options})

    refuse(wan(), "a transformer has one level", tar=Tar({0: 1.0, 1: 8.0}))
    refuse(wan(), "riflex is a temporal frequency, 1 to 2 here, got 5", riflex=5)
    cached = wan()
    cached.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    refuse(cached, "caches between steps")
    fused = wan()
    fused.blocks[0].attn1.fuse_projections()
    refuse(fused, "fused projections")
    model = wan()
    with dial(model, reference=0.5, scheduler=scheduler), pytest.raises(ValueError, match="context parallelism"):
        model.blocks[0].attn1.processor._parallel_config = object()
    two = wan(), wan()
    two[1].blocks[1].attn1.processor = DenseRule(tar)

    class Experts:
        transformer, transformer_2 = two

    before = dict(two[0].attn_processors)
    Experts.scheduler = scheduler
    refuse(Experts(), "transformer_2.blocks.1.attn1 runs DenseRule")
    assert two[0].attn_processors == before, "the first expert is left as it was"


def test_segments_are_exact_for_any_table():
    """Equal rows share their calls, which differ by the values in a row; excluded frames are not read."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5 * 3, 2, 8)
    b = torch.tensor([0.0, -1.0, 2.0])[torch.randint(3, (5, 5))]
    b[3] = b[1]
    b[0, 3:] = -math.inf
    calls = []

    def attend(*given):
        calls.append(given)
        return attend_by(None)(*given)

    ours = by_segments(q, k, v, segments_of(b, 3), attend)
    torch.testing.assert_close(ours, frame_attention_ref(q, k, v, FrameTables(b=b), 3))
    rows = torch.unique(b, dim=0)
    assert len(calls) == sum(len(row[row.isfinite()].unique()) for row in rows)
    with pytest.raises(ValueError, match="tar and decay need by='op'"):
        DialSettings(decay=0.9, trained_frames=21, by="segments")
