"""The page runs its own script and style and nothing else; what it does is seen in a browser by the long tests."""

import asyncio
import re
import shutil
import subprocess
from html.parser import HTMLParser

import httpx
import pytest
from fastapi import FastAPI

import support.serve_packages  # noqa: F401 - skips where they are missing
from vstar_engine.serving.http import page

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


# WCAG 2, level AA, for text of any size
READABLE = 4.5


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_on_what_lies_below_it(theme):
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", rules)) for rules in re.findall(r":root[^{]*{(.*?)}", TEXT, re.S)
    )
    colours = light if theme == "light" else {**light, **dark}
    pairs = [(text, below) for text in ("ink", "soft", "faint", "bad") for below in ("page", "card", "sunk")]
    for text, below in [*pairs, ("bad", "bad-soft"), ("accent-ink", "accent")]:
        darker, lighter = sorted(luminance(colours[name]) for name in (text, below))
        assert (lighter + 0.05) / (darker + 0.05) >= READABLE, (text, below)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js to read the script")
def test_the_script_is_well_formed(tmp_path):
    script = tmp_path / "page.js"
    script.write_text(dict(page.INLINE.findall(TEXT))["script"])
    done = subprocess.run(["node", "--check", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
