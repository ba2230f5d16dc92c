import math

import pytest
import torch

from vstar_engine import Tar
from vstar_engine.config.sampling import TAR_PRESETS, tar_named
from vstar_engine.sampling.tar import table, toeplitz


def test_toeplitz_is_the_gaussian_of_the_distance():
    g = toeplitz(5, 2.0, 0.5)
    assert g.dtype == torch.float32
    assert g.tolist() == pytest.approx([0.5 * math.exp(-d * d / 8) for d in range(5)])


def test_table_has_a_row_per_level_and_stops_after_until():
    tar = Tar({0: 1.0, 1: 8.0}, strength=1.5, until_step=13)
    on, off = table(tar, 4, 16, 13), table(tar, 4, 16, 14)
    assert on.shape == off.shape == (1, 4, 16)
    assert torch.equal(on[0, 0], toeplitz(16, 1.0, 1.5))
    assert torch.equal(on[0, 1], toeplitz(16, 8.0, 1.5))
    assert not on[0, 2:].any()
    assert not off.any()
    assert not table(None, 4, 16, 0).any()


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_sigma(bad):
    with pytest.raises(ValueError, match="sigma"):
        Tar({0: bad})
    with pytest.raises(ValueError, match="sigma"):
        toeplitz(4, bad)


def test_bad_levels():
    with pytest.raises(ValueError, match="level 3 does not exist"):
        table(Tar({3: 1.0}), 3, 16, 0)
    with pytest.raises(ValueError, match="whole number"):
        Tar({-1: 1.0})


def test_presets_are_named_in_capitals_or_not():
    assert tar_named("64d1_32d8") == TAR_PRESETS["64D1_32D8"]
    assert tar_named("None") is None


def test_presets_are_the_published_ones():
    assert {name: dict(tar.sigma) for name, tar in TAR_PRESETS.items() if tar} == {
        "64D1": {0: 1},
        "64D4": {0: 4},
        "64D8": {0: 8},
        "64D1_32D1": {0: 1, 1: 1},
        "64D1_32D8": {0: 1, 1: 8},
        "64D1_32D12": {0: 1, 1: 12},
        "64D4_32D8": {0: 4, 1: 8},
        "64D4_32D12": {0: 4, 1: 12},
    }
