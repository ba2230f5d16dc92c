"""Every golden case agrees with ground truth to its tolerance."""

import pytest
from conftest import GOLDEN

from vstar_engine.verification.golden import Golden
from vstar_engine.verification.judges import KINDS
from vstar_engine.verification.verify import NOT_JUDGED, verify

STREAMING = GOLDEN.parent / "golden_streaming"
FOLDERS = {folder: Golden(folder).cases for folder in (GOLDEN, STREAMING)}
CASES = [(folder, case) for folder, cases in FOLDERS.items() for case in cases if case["kind"] in {*KINDS, *NOT_JUDGED}]
# their files are large: they stand in the full set, and parts of other cases say the same
IN_THE_FULL_SET = {"cam_features", "stream_unet_trace"}


# VideoCrafter2's levels and blocks are judged with TAR; without it they take as long again
SLOW = ("unet_full_topology_plain",)


@pytest.mark.parametrize(
    ("folder", "case"),
    [
        pytest.param(folder, case, id=f"{case['kind']}-{case['name']}", marks=[pytest.mark.slow] * (case["name"] in SLOW))
        for folder, case in CASES
    ],
)
def test_case(folder, case):
    golden_of_one = Golden(folder)
    golden_of_one.cases = [case]
    (row,) = verify(golden_of_one)
    assert row.ok, row


def test_every_kind_is_covered():
    assert {case["kind"] for _, case in CASES} == {*KINDS, *NOT_JUDGED} - IN_THE_FULL_SET
