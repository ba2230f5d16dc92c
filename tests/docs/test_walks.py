"""The walks of architecture.md: the shortest is counted anew, and the page holds all three."""

import re

import pytest

from tools import walks


def rows() -> dict[str, tuple[int, list[str]]]:
    """Reads the page's table: the count and the files of each walk."""
    page = walks.PAGE.read_text().partition(walks.OPENING)[2].partition(walks.CLOSING)[0]
    found = re.findall(r"^\| ([^|]+) \| (\d+) \| (.*) \|$", page, re.MULTILINE)
    return {name: (int(count), re.findall("`([^`]+)`", files)) for name, count, files in found}


def test_the_page_counts_every_walk() -> None:
    assert set(rows()) == set(walks.WALKS)
    assert all(count == len(files) for count, files in rows().values())


def test_a_launch_is_at_most_six_files_away() -> None:
    pytest.importorskip("triton")
    entered = walks.walked("q, k, v to a Triton launch")
    assert entered == rows()["q, k, v to a Triton launch"][1]
    assert len(entered) <= 6
    assert entered[0] == "kernels/temporal_attention.py"
    assert any(file.startswith("kernels/gpu/") for file in entered)
