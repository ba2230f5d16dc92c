"""Every golden case agrees with ground truth to its tolerance."""

import pytest
from conftest import GOLDEN

from vstar_engine.verification.golden import Golden
from vstar_engine.verification.judges import KINDS
from vstar_engine.verification.verify import NOT_JUDGED, verify

CASES = Golden(GOLDEN).cases


# VideoCrafter2's levels and blocks are judged with TAR; without it they take as long again
SLOW = ("unet_full_topology_plain",)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{case['kind']}-{case['name']}", marks=[pytest.mark.slow] * (case["name"] in SLOW))
        for case in CASES
    ],
)
def test_case(golden, case):
    golden_of_one = Golden(GOLDEN)
    golden_of_one.cases = [case]
    (row,) = verify(golden_of_one)
    assert row.ok, row


def test_every_kind_is_covered():
    assert {case["kind"] for case in CASES} == {*KINDS, *NOT_JUDGED}
