"""Every golden case agrees with ground truth to its tolerance."""

import pytest
from conftest import GOLDEN

from vstar_engine.verification.golden import Golden
from vstar_engine.verification.judges import KINDS
from vstar_engine.verification.verify import NOT_JUDGED, verify

CASES = Golden(GOLDEN).cases


@pytest.mark.parametrize("case", CASES, ids=[f"{case['kind']}-{case['name']}" for case in CASES])
def test_case(golden, case):
    golden_of_one = Golden(GOLDEN)
    golden_of_one.cases = [case]
    (row,) = verify(golden_of_one)
    assert row.ok, row


def test_every_kind_is_covered():
    streaming = Golden(GOLDEN.parent / "golden_streaming").cases
    assert {case["kind"] for case in [*CASES, *streaming]} >= {*KINDS, *NOT_JUDGED}
