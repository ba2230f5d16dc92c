"""The page runs its own script and style and nothing else; what it does is seen in a browser by the long tests."""

import asyncio
import re
import shutil
import subprocess
from html.parser import HTMLParser

import httpx
import pytest
import serve_packages  # noqa: F401 - skips where they are missing
from fastapi import FastAPI

from vstar_engine.serving import page

TEXT = page.INDEX.read_text()


class Outline(HTMLParser):
    """Every tag with its attributes, and every id."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


OUTLINE = Outline(TEXT)


def test_the_page_is_served_with_a_policy_for_its_own_script_and_style():
    app = FastAPI()
    app.include_router(page.router)

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return await client.get("/")

    answer = asyncio.run(ask())
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text == TEXT
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy["script-src"])
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert app.openapi()["paths"] == {}


def test_nothing_is_fetched_from_elsewhere_and_no_attribute_runs_or_styles():
    assert len(page.INLINE.findall(TEXT)) == 2
    for tag, attributes in OUTLINE.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href", "action", "srcset", "poster"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert not re.findall(r"(?:url\(|import\s|https?://(?!www\.w3\.org/2000/svg))", TEXT)
    assert "innerHTML" not in TEXT
    assert "document.write" not in TEXT


def test_every_element_the_script_names_is_there_once():
    ids = [attributes["id"] for _, attributes in OUTLINE.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("(\w+)"\)', TEXT)) <= set(ids)


def test_every_control_has_a_name_for_those_who_do_not_see_it():
    labelled = {attributes["for"] for tag, attributes in OUTLINE.tags if tag == "label" and "for" in attributes}
    inside = re.findall(r"<label[^>]*>.*?</label>", TEXT, re.DOTALL)
    for tag, attributes in OUTLINE.tags:
        if tag in ("input", "select", "textarea"):
            id = attributes["id"]
            assert "aria-label" in attributes or id in labelled or any(f'id="{id}"' in label for label in inside), id


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js to read the script")
def test_the_script_is_well_formed(tmp_path):
    script = tmp_path / "page.js"
    script.write_text(dict(page.INLINE.findall(TEXT))["script"])
    done = subprocess.run(["node", "--check", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
