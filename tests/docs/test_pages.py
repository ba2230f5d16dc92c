"""Documents: their length, their tables' width, and every link and anchor of README and of the files beside it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BESIDE = [ROOT / name for name in ("README.md", "AGENTS.md", "CONTRIBUTING.md", "CHANGELOG.md", "llms.txt")]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    """Returns a document without its fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(path: Path) -> set[str]:
    """Returns the anchors of a page's headings, as the site and the forge spell them."""
    heads = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", [*PAGES, *BESIDE], ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(without_code(path.read_text())):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(found), f"{target}: no such heading"


@pytest.mark.parametrize("path", [*PAGES, *BESIDE], ids=name_of)
def test_files_that_are_named_are_there(path: Path) -> None:
    named = re.findall(r"`((?:vstar_engine|kernels|export|bench|tools|tests|csrc|deploy|docs)/[\w/.-]*\w/?)`", path.read_text())
    assert [file for file in named if "NAME" not in file and not (ROOT / file).exists()] == []


@pytest.mark.parametrize("path", [*PAGES, *BESIDE], ids=name_of)
def test_a_table_has_at_most_six_columns(path: Path) -> None:
    rules = re.findall(r"^\|(?: ?:?-+:? ?\|)+$", path.read_text(), re.MULTILINE)
    assert [rule for rule in rules if rule.count("|") > 7] == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_a_page_has_at_most_250_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 250


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1200


def test_every_page_is_in_the_navigation_and_on_the_first_page() -> None:
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == {str(path.relative_to(ROOT / "docs")) for path in PAGES}
    listed = set(LINK.findall((ROOT / "docs" / "index.md").read_text()))
    assert {name for name in named if not name.startswith("claims/")} - {"index.md"} <= listed


def test_what_has_not_run_is_said_in_the_status_alone() -> None:
    said = re.compile(r"^(?!.*status).*(has|have) not run.*$", re.IGNORECASE | re.MULTILINE)
    texts = {name_of(path): path.read_text() for path in [*PAGES, *BESIDE] if path.name != "status.md"}
    assert {name: said.findall(text) for name, text in texts.items() if said.search(text)} == {}
