"""VSTAR's rule on diffusers' UNets, against the rule spelled out densely."""

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

import diffusers
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import AttnProcessor

from support.tiny_pipelines import motion_unet, unet3d
from vstar_engine.config.sampling import Tar
from vstar_engine.integrations.diffusers import Dial, DialSettings, dial

TAR = Tar({0: 1.0, 1: 2.5}, strength=0.8)
# of 8 x 8 latents: a level's positions to its sigma
SIGMA_BY_POSITIONS = {64: 1.0, 16: 2.5}


class DenseRule:
    """softmax(phi + m * strength * exp(-d^2 / 2 sigma^2)) @ v, T x T in memory; the level by the number of positions."""

    def __init__(self, videos):
        self.videos = videos

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        positions, frames, _ = hidden_states.shape
        sigma = SIGMA_BY_POSITIONS.get(positions // self.videos)
        q, k, v = (
            to(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for to in (attn.to_q, attn.to_k, attn.to_v)
        )
        phi = q @ k.mT / q.shape[-1] ** 0.5
        if sigma is not None:
            at = torch.arange(frames)
            gaussian = TAR.strength * torch.exp(-((at[:, None] - at) ** 2) / (2 * sigma**2))
            phi = phi + phi.amax(-1, keepdim=True) * gaussian
        out = (phi.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


def spelled_out(model, videos, stem="transformer_in"):
    """Puts the dense rule on every temporal attention but the stem's; returns what was there."""
    before = dict(model.attn_processors)
    temporal = [name for name in before if "temp_attentions" in name or "motion_modules" in name]
    assert temporal
    model.set_attn_processor({**before, **{name: DenseRule(videos) for name in temporal}})
    return before


@pytest.fixture(scope="module")
def scheduler():
    made = diffusers.DDIMScheduler()
    made.set_timesteps(10)
    return made


def given(kind, videos=2, frames=5):
    torch.manual_seed(1)
    texts = videos * frames if kind is motion_unet else videos
    return torch.randn(videos, 4, frames, 8, 8), torch.randn(texts, 7, 8)


def run(model, latents, timestep, text):
    with torch.no_grad():
        return model(latents, timestep, text).sample


@pytest.mark.parametrize("kind", [unet3d, motion_unet])
@pytest.mark.parametrize("frames", [1, 5])
def test_the_rule(kind, frames, scheduler):
    """Two prompts in a batch, odd frame counts; the stem is left alone."""
    model = kind()
    latents, text = given(kind, frames=frames)
    early, late = scheduler.timesteps[5], scheduler.timesteps[6]
    plain = run(model, latents, early, text), run(model, latents, late, text)
    before = dict(model.attn_processors)
    with dial(model, tar=TAR, until=0.56, scheduler=scheduler) as on:
        assert isinstance(on, Dial)
        ours = run(model, latents, early, text)
        assert torch.equal(run(model, latents, late, text), plain[1]), "past its share of the steps it is off to the bit"
    assert all(model.attn_processors[name] is processor for name, processor in before.items())
    assert torch.equal(run(model, latents, early, text), plain[0])
    spelled_out(model, len(latents))
    torch.testing.assert_close(ours, run(model, latents, early, text), rtol=0, atol=1e-5)
    if frames > 1:
        assert (ours - plain[0]).abs().max() > 1e-3


def test_guidance_batched_and_split(scheduler):
    model = unet3d()
    latents, text = given(unet3d)
    with dial(model, tar=TAR, scheduler=scheduler):
        batched = run(model, latents, scheduler.timesteps[0], text)
        split = [run(model, latents[i : i + 1], scheduler.timesteps[0], text[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(batched, torch.cat(split), rtol=0, atol=1e-5)


def test_until_step_is_the_default_of_tar(scheduler):
    model = unet3d()
    latents, text = given(unet3d, videos=1)
    plain = [run(model, latents, t, text) for t in scheduler.timesteps]
    with dial(model, tar=Tar({0: 1.0}, until_step=2), scheduler=scheduler):
        same = [torch.equal(run(model, latents, t, text), a) for t, a in zip(scheduler.timesteps, plain, strict=True)]
    assert same == [False] * 3 + [True] * 7


def test_a_strength_of_zero_is_the_original_processor(scheduler):
    model = unet3d()
    latents, text = given(unet3d)
    plain = run(model, latents, scheduler.timesteps[0], text)
    with dial(model, tar=Tar({0: 1.0}, strength=0.0), scheduler=scheduler):
        assert torch.equal(run(model, latents, scheduler.timesteps[0], text), plain)


def test_a_motion_model_goes_past_its_table(scheduler):
    """Positions are spread over the table's range; up to its length it is the model's own."""
    model = motion_unet(positions=4)
    latents, text = given(motion_unet, frames=7)
    with pytest.raises(RuntimeError):
        run(model, latents, scheduler.timesteps[0], text)
    block = model.down_blocks[0].motion_modules[0].transformer_blocks[0]
    table, inside = block.pos_embed.pe[0], block.pos_embed
    with dial(model, tar=TAR, scheduler=scheduler) as on:
        assert "stretched" in str(on.report())
        assert torch.isfinite(run(model, latents, scheduler.timesteps[0], text)).all()
        added = block.pos_embed(torch.zeros(1, 7, table.shape[-1]))[0]
    torch.testing.assert_close(added[::2], table)
    torch.testing.assert_close(added[1], (table[0] + table[1]) / 2)
    assert block.pos_embed is inside


def test_the_report_names_each_layer(scheduler):
    model = unet3d()
    on = dial(model, tar=Tar({1: 2.0}), scheduler=scheduler)
    report = on.report()
    assert [line.path.split(".")[:2] for line in report.layers] == [["down_blocks", "1"]] * 2 + [["up_blocks", "1"]] * 4
    assert "transformer_in: the stem is never regularised" in str(report)
    on.off()
    on.off()
    assert str(on.report()) == "the dial is off"


def test_refusals(scheduler):
    def refuse(model, match, **options):
        before = dict(model.attn_processors) if hasattr(model, "attn_processors") else {}
        with pytest.raises(ValueError, match=match):
            dial(model, **{"tar": TAR, "scheduler": scheduler, **options})
        assert all(model.attn_processors[name] is kept for name, kept in before.items())

    refuse(unet3d(), "TAR level 3 does not exist", tar=Tar({3: 1.0}))
    refuse(unet3d(), "the dial of a UNet3DConditionModel is tar=", tar=None, reference=0.5)
    refuse(torch.nn.Linear(1, 1), "is a Linear, and dials are known for UNet3DConditionModel")
    refuse(unet3d(), "needs a scheduler", scheduler=None)
    fused = unet3d()
    fused.down_blocks[0].temp_attentions[0].transformer_blocks[0].attn1.fuse_projections()
    refuse(fused, "fused projections")
    other = unet3d()
    other.down_blocks[0].temp_attentions[0].transformer_blocks[0].attn1.processor = DenseRule(1)
    refuse(other, "runs DenseRule, which is not known")
    compiled = unet3d()
    compiled.down_blocks[0].compile(backend="eager")
    refuse(compiled, "is compiled: put the dial on first")
    parallel = unet3d()
    parallel._parallel_config = object()
    refuse(parallel, "context parallelism")
    taken = unet3d()
    with dial(taken, tar=TAR, scheduler=scheduler):
        refuse(taken, "has a dial or a timeline already")
    with pytest.raises(ValueError, match="has no denoiser"):
        dial(object(), tar=TAR, scheduler=scheduler)


def test_a_processor_set_later_is_no_silent_failure(scheduler):
    model = unet3d()
    latents, text = given(unet3d)
    with dial(model, tar=TAR, scheduler=scheduler):
        model.set_attn_processor(AttnProcessor())
        with pytest.raises(RuntimeError, match="since the dial was put on"):
            run(model, latents, scheduler.timesteps[0], text)
    with pytest.raises(ValueError, match="none of the scheduler's"), dial(model, tar=TAR, scheduler=scheduler):
        run(model, latents, torch.tensor(5000), text)


def test_compiled_after_the_dial(scheduler):
    """One graph serves every step before `until`, and one those after it."""
    model = unet3d()
    latents, text = given(unet3d, videos=1)
    with dial(model, tar=TAR, until=0.5, scheduler=scheduler):
        eager = [run(model, latents, scheduler.timesteps[i], text) for i in (0, 9)]
        model.down_blocks[0].temp_attentions[0].compile(backend="eager", fullgraph=True)
        compiled = [run(model, latents, scheduler.timesteps[i], text) for i in (0, 9)]
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-6)


def test_settings_are_json():
    settings = DialSettings(tar=TAR, until="56%")
    assert DialSettings.from_json(settings.to_json()) == settings
    assert DialSettings.from_json('{"reference": 0.5}').reference == 0.5
    assert [settings.last_step(steps) for steps in (25, 4)] == [13, 1]
    assert [DialSettings(reference=0.5, until=0.56).last_step(25), DialSettings(reference=0.5).last_step(25)] == [13, 24]
    with pytest.raises(ValueError, match="got speed"):
        DialSettings.from_json('{"speed": 1}')
    for wrong in (
        {"reference": -1.0},
        {"decay": 0.9},
        {"riflex": 0},
        {"until": 1.5},
        {"until": "x"},
        {"enhance": float("nan")},
    ):
        with pytest.raises(ValueError, match=r"is|needs"):
            DialSettings(**wrong)


class AddedUpdate(ModelHook):
    """Adds a low-rank update to a layer's result, as a LoRA does, from outside of it, as offloading hooks work."""

    def pre_forward(self, module, *args, **kwargs):
        self.given = args[0]
        return args, kwargs

    def post_forward(self, module, output):
        generator = torch.Generator().manual_seed(0)
        down = torch.randn(self.given.shape[-1], 2, generator=generator)
        up = torch.randn(2, output.shape[-1], generator=generator)
        return output + 0.1 * self.given @ down @ up


def test_hooks_and_low_rank_updates_stay_in_force(scheduler):
    model = unet3d()
    latents, text = given(unet3d)
    plain = run(model, latents, scheduler.timesteps[0], text)
    for name, module in model.named_modules():
        if "temp_attentions" in name and name.endswith((".to_q", ".to_v", ".to_out.0")):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(AddedUpdate(), "update")
    HookRegistry.check_if_exists_or_initialize(model).register_hook(ModelHook(), "whole")
    with dial(model, tar=TAR, scheduler=scheduler):
        ours = run(model, latents, scheduler.timesteps[0], text)
    spelled_out(model, len(latents))
    torch.testing.assert_close(ours, run(model, latents, scheduler.timesteps[0], text), rtol=0, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-3
