"""A test that cannot have its wheels is skipped, or fails where the CI says that nothing may be."""

import pytest

from support import scratch


@pytest.mark.parametrize(("said", "end"), [("0", pytest.skip.Exception), ("1", pytest.fail.Exception)], ids=["here", "ci"])
def test_wheels_that_cannot_be_had(said, end, tmp_path, monkeypatch):
    monkeypatch.setenv("VSTAR_WHEELS", said)
    monkeypatch.setattr(scratch, "CACHE", tmp_path)
    with pytest.raises(end, match=r"needs the wheels \./nowhere\.whl"):
        scratch.installed("nowhere", "./nowhere.whl")
    assert [path.name for path in tmp_path.iterdir()] == [f"nowhere-py{scratch.PYTHON}.lock"]
