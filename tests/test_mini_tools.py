"""The mini model's training set: seeded, true to its factors, and told in words the model card lists."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tools.mini import captions, claims, probe, stories, tables
from tools.mini.pack import pack
from tools.mini.render import render
from tools.mini.scenes import SEASONS, sample
from vstar_engine.artifacts import WEIGHTS, read_manifest
from vstar_engine.config import FAST, VaeSpec, model_named
from vstar_engine.text import TextTower, anchor_frames
from vstar_engine.unet import UNet
from vstar_engine.vae import Vae


def scene(**changes):
    """A still clip at noon in summer without an object, one factor changed."""
    base = stories.Story("", (stories.State("", {}),), changes.pop("thing", "none"), changes.pop("colour", "white"))
    state = stories.State("", changes)
    return render(stories.Story("", (state,), base.thing, base.colour).clip(1, 3))[0].astype(float)


def test_a_seed_draws_the_same_clip_again_and_another_does_not():
    first, again, other = (render(sample(seed)) for seed in (5, 5, 6))
    assert first.shape == (16, 96, 128, 3)
    assert first.dtype == np.uint8
    assert (first == again).all()
    assert (first != other).any()


def test_most_clips_keep_one_state():
    clips = [sample(seed) for seed in range(400)]
    changing = [
        max(np.ptp(c.season), np.ptp(c.day), np.ptp(c.colour, axis=0).max(), np.ptp(c.weather_amount)) > 0 for c in clips
    ]
    assert 0.2 < np.mean(changing) < 0.35
    neighbours = [np.abs(np.diff(render(c).astype(float), axis=0)).mean() for c in clips[:20]]
    assert 0.0 < np.mean(neighbours) < 8.0  # of 255: gentle motion


def test_winter_is_white_night_is_dark_and_summer_green():
    winter, summer, night = scene(season="winter"), scene(season="summer"), scene(day="night")
    assert winter[80:].mean() > 220
    assert summer[80:, :, 1].mean() > 1.5 * summer[80:, :, [0, 2]].mean()
    assert night.mean() < 0.5 * summer.mean()


@pytest.mark.parametrize("thing", ["house", "boat", "car", "ball", "balloon"])
def test_an_object_shows_its_colour(thing):
    red, blue, none = (scene(thing=t, colour=c) for t, c in ((thing, "red"), (thing, "blue"), ("none", "red")))
    where = np.abs(red - blue).sum(-1) > 200
    assert where.mean() > 0.005
    assert where.mean() < 0.15  # an object is no backdrop
    assert red[where][:, 0].mean() > 2 * red[where][:, 2].mean()
    assert blue[where][:, 2].mean() > 2 * blue[where][:, 0].mean()
    assert (none[~where] == red[~where]).mean() > 0.8


def test_rain_and_snow_are_seen():
    clear, rain, snow = (scene(weather=name) for name in ("clear", "rain", "snow"))
    assert np.abs(clear - rain).mean() > 10
    assert np.abs(clear - snow).mean() > 10


def test_captions_use_the_listed_words_only_and_say_true_shares():
    known = set(captions.vocabulary())
    for seed in range(300):
        told = captions.caption(sample(seed), np.random.default_rng(seed))
        assert set(told.text.lower().replace(",", " ").replace(".", " ").split()) <= known
        assert told.target.shape == (34,)
        for shares in told.said.values():
            assert shares.sum() == pytest.approx(1.0)


def test_hats_share_a_place_between_neighbours():
    places = list(SEASONS.values())
    assert captions.hats(0.0, places).argmax() == 0
    np.testing.assert_allclose(captions.hats(2.25, places)[[5, 6]], [0.5, 0.5])
    np.testing.assert_allclose(captions.hats(3.75, places)[[8, 0]], [0.5, 0.5])
    np.testing.assert_allclose(captions.hats(-0.25, places), captions.hats(3.75, places))


@pytest.mark.parametrize("story", stories.STORIES, ids=lambda story: story.prompt[:40].replace(" ", "_"))
def test_a_rendered_story_passes_through_its_states(story):
    clip = story.clip(64, 0)
    for state, frame in zip(story.states, anchor_frames(len(story.states), 64), strict=True):
        true = probe.truth(clip, frame)
        for factor, shares in state.shares().items():
            np.testing.assert_allclose(true[factor], shares, atol=1e-6, err_msg=f"{factor} at frame {frame}")


def test_states_in_order():
    assert claims.in_order(np.array([0, 0, 1, 2, 2]), 3) == 3
    assert claims.in_order(np.array([2, 1, 0]), 3) == 1
    assert claims.in_order(np.array([0, 2, 1, 0]), 3) == 2
    assert claims.in_order(np.array([1, 1]), 3) == 1


def test_every_story_is_told_in_every_arm():
    cases = list(dict.fromkeys(claims.cases()))
    at_64 = [case for case in cases if case.frames == 64 and case.sigma in ((), ((0, 1.0), (1, 8.0))) and not case.fast]
    assert len([c for c in at_64 if c.arm == "base"]) == 60
    assert len([c for c in at_64 if c.arm == "both"]) == 60


def test_every_option_of_fast_has_its_exact_videos():
    cases = {case.key for case in claims.cases()}
    lossy = [case for case in claims.cases() if case.fast]
    assert {name for case in lossy for name in case.fast.split(",")} == set(FAST)
    assert len(lossy) == len(tables.FASTER) * 2 * 5
    assert all(replace(case, fast="").key in cases for case in lossy)
    assert "fast" not in replace(lossy[0], fast="").content


@pytest.mark.parametrize(("fast", "steps"), [(fast, 4 if fast == "few-step" else 10) for fast in ("", *tables.FASTER)])
def test_an_option_is_sampled_as_it_is_named_and_regularised_as_long(fast, steps):
    case = claims.Case("both", 0, 0, 16, (), fast)
    assert case.sampling.steps == steps
    assert set(case.sampling.fast) == {name for name in fast.split(",") if name not in ("", "fp8")}
    assert claims.until(steps) == {10: 5, 4: 1}[steps]


def test_what_fast_costs_is_told_beside_the_exact_videos_of_the_same_stories():
    found = [measured("both", story, 0.1 * story) for story in range(4)]
    lossy = [measured("both", story, 0.1 * story + 0.3) for story in (1, 3)]
    found += [row | {"case": row["case"] | {"fast": "guidance-interval,step-cache"}} for row in lossy]
    made = tables.tables(found)
    assert [line.split(" | ")[:2] for line in made["fast-64"].splitlines()[2:]] == [
        ["| exact", "0.200 [0.100, 0.300]"],
        ["| guidance-interval, step-cache", "0.500 [0.400, 0.600]"],
    ]
    assert made["fast-16"] == ""
    assert "| states and TAR (VSTAR) | 0.150" in made["frames-64"]


def measured(arm, story, dynamics, extra=()):
    numbers = {name: {"dynamics": dynamics, "neighbours": 0.99} for name in ("pixels", "features", "factors", *extra)}
    numbers |= {"visited": 1.0, "at_anchors": 0.5, "alignment": 0.25, "cuts": 0}
    sigma = [list(level) for level in tables.PAPER.items()] if arm in ("tar", "both") else []
    numbers["pixels"]["curve"] = {str(apart): 1 - dynamics for apart in tables.SHOWN}
    return {"case": {"arm": arm, "story": story, "seed": 0, "frames": 64, "sigma": sigma}, "numbers": numbers}


@pytest.mark.parametrize("extra", [(), ("dreamsim",)])
def test_tables_show_a_planted_difference_and_only_what_every_row_has(extra):
    found = [measured("base", story, 0.1 * story, extra) for story in range(4)]
    found += [measured("both", story, 0.1 * story + 0.3, extra) for story in range(4)]
    made = tables.tables(found)
    line = next(line for line in made["differences"].splitlines() if line.startswith("| VSTAR - base, 64 frames"))
    assert line.count("0.300 [0.300, 0.300]") == (4 if extra else 3)
    assert ("DreamSim" in made["frames-64"]) == bool(extra)
    assert made["frames-16"] == ""
    assert made["intervals"].splitlines()[-1].startswith("| states and TAR (VSTAR) | 0.550 |")


@pytest.mark.parametrize("path", claims.DOCUMENTS, ids=lambda path: path.name)
def test_the_claims_in_documents_are_those_measured(path):
    document = path.read_text()
    assert "<!-- claims:" in document
    assert claims.renewed(document, claims.rows(claims.RESULTS)) == document


def test_whitening_leaves_pixels_and_makes_latents_plain():
    from tools.mini.train_vae import whiten

    torch.manual_seed(0)
    vae = Vae(VaeSpec(channels=32, channel_mult=(1, 1), num_res_blocks=1)).eval()
    images = torch.rand(24, 3, 16, 16) * 2 - 1
    with torch.inference_mode():
        before = vae.decoder(vae.post_quant_conv(vae.posterior(images)[0]))
    whiten(vae, images)
    with torch.inference_mode():
        after = vae.decode(vae.encode(images).transpose(0, 1)[None])[0].transpose(0, 1)
        codes = vae.encode(images).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(after, before, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(codes.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(codes.T.cov(), torch.eye(4), atol=2e-3, rtol=0)


def test_packed_weights_are_read_as_any_converted_ones(tmp_path):
    spec = model_named("mini")
    text = TextTower(spec.text)
    for parameter in text.parameters():  # its attention and positions are drawn by the training, not by the layer
        torch.nn.init.zeros_(parameter)
    pack(spec, UNet(spec.unet), Vae(spec.vae), text, tmp_path / "mini")
    manifest = read_manifest(tmp_path / "mini", WEIGHTS)
    assert manifest["vocabulary"] == captions.vocabulary()
    assert {path.name for path in (tmp_path / "mini").iterdir()} == {"manifest.json", "model.safetensors"}
