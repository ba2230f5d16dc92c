"""Each measure of a video against a clip whose answer was planted."""

import numpy as np
import pytest

from vstar_engine.analysis import similarity
from vstar_engine.analysis.metrics.drift import drift
from vstar_engine.analysis.metrics.flicker import flicker
from vstar_engine.analysis.metrics.loops import loop
from vstar_engine.analysis.metrics.mawe import Mawe, mawe, splat
from vstar_engine.analysis.metrics.seams import seams

SIDE = 64


def texture(seed=0, side=2 * SIDE):
    """A smooth random picture (side, side, 3), which flow can follow."""
    rng = np.random.default_rng(seed)
    picture = rng.random((side // 8, side // 8, 3))
    for axis in (0, 1):
        places = np.linspace(0, side // 8 - 1, side)
        low, share = np.floor(places).astype(int), places % 1
        high = np.minimum(low + 1, side // 8 - 1)
        share = share.reshape([-1 if i == axis else 1 for i in range(3)])
        picture = picture.take(low, axis) * (1 - share) + picture.take(high, axis) * share
    return (255 * picture).astype(np.uint8)


def panned(frames, step=1, seed=0):
    """A clip that moves over a picture by `step` pixels a frame."""
    picture = texture(seed)
    return np.stack([picture[:SIDE, i * step : i * step + SIDE] for i in range(frames)])


def alike(frames):
    return similarity.cosine(similarity.pixels(frames))


def test_a_seam_is_where_neighbours_are_least_alike():
    clip = np.concatenate([panned(20), panned(20, seed=1)])
    found = seams(alike(clip), [20])
    assert found.across == found.worst < found.inside
    assert found.ratio > 10
    nowhere = seams(alike(panned(40)), [20])
    assert nowhere.ratio == pytest.approx(1, abs=0.6)
    assert np.isnan(seams(alike(clip), []).across)
    with pytest.raises(ValueError, match="within 1 to 39, got"):
        seams(alike(clip), [40])


def test_drift_is_what_the_last_stretch_lacks_of_the_first():
    still = np.repeat(panned(1), 40, axis=0)
    assert drift(alike(still), 10) == pytest.approx(0, abs=1e-6)
    assert drift(alike(panned(60)), 10) > 0.05
    with pytest.raises(ValueError, match="2 to 20 frames, got 21"):
        drift(alike(still), 21)


def test_a_looped_clip_is_a_loop():
    looped = loop(alike(np.concatenate([panned(24, 2)] * 4)))
    assert (looped.period, looped.returns) == (24, True)
    assert not loop(alike(panned(60))).returns


def test_a_shuffled_clip_flickers():
    clip = panned(40)
    shuffled = clip[np.random.default_rng(0).permutation(40)]
    assert flicker(shuffled) > 8 * flicker(clip)
    levels = np.arange(0, 200, 20, dtype=np.uint8)[:, None, None, None]
    assert flicker(np.broadcast_to(levels, (10, 16, 16, 3))) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="at least 3 frames, got 2"):
        flicker(clip[:2])


def test_a_cut_is_a_cut():
    pytest.importorskip("scenedetect")
    from vstar_engine.analysis.metrics.scene_cuts import scene_cuts

    dark, bright = panned(20) // 4, 255 - panned(20, seed=1) // 4
    assert scene_cuts(np.concatenate([dark, bright])) == [20]
    assert scene_cuts(panned(40)) == []


def test_flow_follows_a_pan():
    pytest.importorskip("cv2")
    from vstar_engine.analysis.metrics.optical_flow import flows

    found = list(flows(panned(3, 2)))
    assert [flow.shape for flow in found] == [(2, SIDE, SIDE)] * 2
    # away from the edge where the picture enters
    assert np.median(found[0][0, :, 8:-8]) == pytest.approx(-2, abs=0.1)
    assert np.median(found[0][1]) == pytest.approx(0, abs=0.1)
    with pytest.raises(ValueError, match="at least 16x16 pixels, got 8x64"):
        next(flows(panned(3)[:, :8]))


def test_warp_error_of_a_pan_is_none_and_of_noise_is_large():
    clip, flow = panned(4, 2), np.stack([np.full((SIDE, SIDE), -2.0), np.zeros((SIDE, SIDE))])
    known = mawe(clip, [flow] * 3)
    assert (known.mean_of_ratios, known.ratio_of_means) == (0, 0)
    assert known.motions == pytest.approx(2)
    assert mawe(clip, [flow * 0 + 1] * 3).mean_of_ratios > 1
    still = Mawe(np.array([1.0, 1.0]), np.zeros(2))
    assert np.isnan(still.mean_of_ratios)
    assert np.isnan(still.ratio_of_means)


def test_the_last_of_the_pixels_that_meet_stays():
    frame = np.arange(12, dtype=np.uint8).reshape(1, 4, 3)
    moved, filled = splat(frame, np.array([[[1.0, 0.0, 0.5, 5.0]], [[0.0] * 4]]))
    np.testing.assert_array_equal(filled, [[False, True, True, False]])
    np.testing.assert_array_equal(moved[0, 1:3], frame[0, 1:3])  # 2.5 rounds to the even 2


def test_a_row_has_every_measure():
    pytest.importorskip("scenedetect")
    from vstar_engine.analysis.metrics.summary import summary

    row = summary(panned(24), borders=[8, 16])
    assert (row["frames"], row["cuts"], row["flow"]) == (24, 0, "DIS medium")
    assert row["across"] == pytest.approx(row["inside"], abs=0.02)
    assert row["motion"] == pytest.approx(1, abs=0.3)
