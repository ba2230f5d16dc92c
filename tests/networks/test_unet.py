"""What the golden cases do not say of the UNet: batches, conditioning shapes, layouts and choices."""

import types
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vstar_engine.config.models import MODELS, UNetSpec
from vstar_engine.errors import MissingLibrary
from vstar_engine.networks.layers import CrossAttention, Linear, sinusoid
from vstar_engine.networks.unet import UNet
from vstar_engine.sampling.tar import toeplitz

SPEC = UNetSpec(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0, 1), head_dim=8, context_dim=12)
SAME = {"rtol": 1e-4, "atol": 1e-5}


def made(spec=SPEC, **options):
    torch.manual_seed(3)
    return UNet(spec, **options).eval().requires_grad_(False)


def inputs(batch=1, frames=6, height=4, width=8, spec=SPEC):
    generator = torch.Generator().manual_seed(5)
    return {
        "latents": torch.randn(batch, 4, frames, height, width, generator=generator),
        "timestep": torch.randint(0, 1000, (batch, 1), generator=generator),
        "context": torch.randn(batch, frames, 77, spec.context_dim, generator=generator),
        "fps": torch.randint(8, 30, (batch,), generator=generator),
        "tar": torch.stack([toeplitz(frames, 1.0), toeplitz(frames, 4.0)]).expand(batch, -1, -1).clone(),
    }


def test_a_batch_is_its_items_one_by_one():
    """Regularised too: the published code guesses levels from shapes and drops TAR for a batch of two."""
    net, both = made(), inputs(batch=2)
    both["tar"][1] = 0.0
    out = net(**both)
    for i in range(2):
        assert torch.allclose(out[i : i + 1], net(**{name: value[i : i + 1] for name, value in both.items()}), **SAME)
    unregularised = {**both, "tar": torch.zeros_like(both["tar"])}
    assert not torch.allclose(out[0], net(**unregularised)[0], **SAME)


@pytest.mark.parametrize("levels", [(0, 1), (1,), ()], ids=str)
def test_texts_of_one_video_share_what_comes_before_them(levels):
    """Also where the first cross-attention is in the middle of the network, between two residual blocks."""
    net = made(spec := replace(SPEC, attention_levels=levels))
    videos, texts = inputs(batch=2, spec=spec), inputs(batch=6, spec=spec)["context"]
    videos["timestep"] = videos["timestep"] + torch.arange(6)
    videos["tar"][1] *= 0.5
    seen = []
    net.input_blocks[0].register_forward_hook(lambda block, given, out: seen.append(len(given[0])))
    apart = {name: torch.cat([value] * 3) for name, value in videos.items()}
    assert torch.allclose(net(**{**videos, "context": texts}), net(**{**apart, "context": texts}), **SAME)
    assert seen == [2 * 6, 6 * 6]


def test_texts_are_a_multiple_of_videos():
    with pytest.raises(ValueError, match="as many rows as latents, 2, or a multiple, got 3"):
        made()(**{**inputs(batch=2), "context": inputs(batch=3)["context"]})


def test_one_row_of_tar_serves_the_batch():
    net, both = made(), inputs(batch=2)
    assert torch.allclose(net(**both), net(**{**both, "tar": both["tar"][:1]}), **SAME)


def test_dense_tar_equals_its_toeplitz_rows():
    net, given = made(), inputs()
    frames = given["latents"].shape[2]
    distance = (torch.arange(frames)[:, None] - torch.arange(frames)).abs()
    assert torch.allclose(net(**given), net(**{**given, "tar": given["tar"][..., distance]}), **SAME)


def test_shared_conditioning_equals_its_repetition():
    net, given = made(), inputs(batch=2)
    given["context"] = given["context"][:, :1]
    frames = given["latents"].shape[2]
    repeated = {
        **given,
        "context": given["context"].expand(-1, frames, -1, -1),
        "timestep": given["timestep"].expand(-1, frames),
    }
    assert torch.allclose(net(**given), net(**repeated), **SAME)


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 4, 4), (2, 8, 4), (7, 2, 12), (130, 2, 2)], ids=str)
def test_any_length_and_aspect(frames, height, width):
    given = inputs(frames=frames, height=height, width=width)
    out = made()(**given)
    assert out.shape == given["latents"].shape
    assert torch.isfinite(out).all()


def test_memory_layout_does_not_change_the_numbers():
    net, given = made(), inputs()
    out = net(**given)
    for parameter in net.parameters():
        if parameter.dim() in (4, 5):
            layout = torch.channels_last if parameter.dim() == 4 else torch.channels_last_3d
            parameter.data = parameter.data.contiguous(memory_format=layout)
    assert torch.allclose(net(**given), out, **SAME)


def test_texts_of_unlike_lengths_are_projected_as_they_are():
    """A text for all frames is one row for every layer, beside as many rows as frames of another."""
    net, given, seen = made(), inputs(), []
    states, empty = given["context"], given["context"][:, :1] + 1
    wanted = net(**{**given, "context": torch.cat([states, empty.expand_as(states)])})
    layers = [part for part in net.modules() if isinstance(part, CrossAttention)]
    hooks = [layer.to_kv.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0])) for layer in layers]
    context_kv = net.prepare_context(states, empty)
    assert seen == [states.shape[1] + 1] * len(layers)
    assert torch.allclose(net(**{**given, "context": context_kv}), wanted, **SAME)
    assert len(seen) == len(layers)
    assert net.prepare_context(empty).shape[:2] == (1, 1)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("texts", [1, 2])
def test_a_timestep_table_serves_every_step_without_the_embedding_layers(texts):
    net, given = made(), inputs(2)
    context = torch.cat([given["context"] * (1 + i) for i in range(texts)])
    timesteps = torch.tensor([901, 481, 1])
    table = net.timestep_table(timesteps, given["fps"])
    assert table.rows.shape[:3] == (3, 2, 1)
    wanted = [net(**{**given, "context": context, "timestep": t.expand(2, 1)}) for t in timesteps]
    net.time_embed = net.fps_embedding = None
    for row, noise in zip(table.rows, wanted, strict=True):
        found = net(**{**given, "context": context, "timestep": table.embedding(row), "fps": None})
        assert torch.allclose(found, noise, **SAME)
    assert not torch.allclose(wanted[0], wanted[1], **SAME)


def test_the_stem_is_never_regularised():
    net, given = made(UNetSpec(32, (1,), 0, (), 8, 12)), inputs()
    spread_out = {**given, "tar": 5 * given["tar"][:, :1]}
    # without transformers below, only the stem and the middle attend over frames; take the middle's rows away
    net.middle_block[2] = torch.nn.Identity()
    assert torch.equal(net(**spread_out), net(**{**given, "tar": 0 * given["tar"][:, :1]}))


def test_spatial_attention_through_xformers_gives_the_same_numbers(modules):
    calls = []

    def memory_efficient_attention(q, k, v):
        calls.append(q.shape)
        return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    modules({"xformers": package, "xformers.ops": ops})
    given = inputs()
    assert torch.allclose(made(spatial_attention="xformers")(**given), made()(**given), **SAME)
    assert all(len(shape) == 4 and shape[-2:] in ((4, 8), (8, 8)) for shape in calls)
    assert len(calls) == 14  # self- and cross-attention of seven spatial transformers


def test_spatial_attention_that_is_not_there(modules):
    modules({"xformers.ops": None})
    with pytest.raises(MissingLibrary, match="needs the xformers package"):
        made(spatial_attention="xformers")
    with pytest.raises(ValueError, match="auto, sdpa, xformers"):
        made(spatial_attention="flash")


def test_sinusoid_puts_cosines_first():
    assert sinusoid(torch.tensor([0.0]), 6).tolist() == [[1, 1, 1, 0, 0, 0]]


def test_full_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        net = UNet(MODELS["videocrafter2"].unet)
    assert sum(p.numel() for p in net.parameters()) == 1_413_284_420


def test_levels_of_the_published_architecture():
    with torch.device("meta"):
        net = UNet(MODELS["videocrafter2"].unet)

    def levels(blocks):
        return {i: stage.level for i, stage in enumerate(blocks) if len(stage) > 2}

    assert levels(net.input_blocks) == {1: 0, 2: 0, 4: 1, 5: 1, 7: 2, 8: 2}
    assert levels(net.output_blocks) == {3: 2, 4: 2, 5: 2, 6: 1, 7: 1, 8: 1, 9: 0, 10: 0, 11: 0}
    assert net.middle_block.level == 3


@pytest.mark.parametrize("shape", [(3, 5, 32), (2, 4, 7, 32), (1, 5, 32), (5, 32), (2, 1, 32)], ids=str)
@torch.no_grad()
def test_linear_is_linear_however_it_runs(shape):
    layer, x = Linear(32, 96), torch.randn(shape)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    for given in (x, x.transpose(0, -2).contiguous().transpose(0, -2)):
        out = layer(given)
        assert out.is_contiguous()
        torch.testing.assert_close(out, expected)
