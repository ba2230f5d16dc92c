"""The mini model's training set: seeded, true to its factors, and told in words the model card lists."""

import numpy as np
import pytest

from tools.mini.claims import stories
from tools.mini.data import captions
from tools.mini.data.render import render
from tools.mini.data.scenes import SEASONS, sample
from tools.mini.training import probe
from vstar_engine.config.timeline import anchor_frames


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
