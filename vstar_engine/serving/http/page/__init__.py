"""The web page at `/`: one file, whose content security policy allows only its own script and style."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

INDEX = Path(__file__).parent / "index.html"
INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)
SELF = "default-src 'none'; connect-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:"
NOWHERE = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

router = APIRouter(include_in_schema=False)


@cache
def page() -> tuple[bytes, str]:
    """Returns the page and its content security policy, which names its script and style by their hashes."""
    text = INDEX.read_text(encoding="utf-8")
    allowed = [f"{kind}-src 'sha256-{_digest(content)}'" for kind, content in INLINE.findall(text)]
    return text.encode(), "; ".join([SELF, *allowed, NOWHERE])


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@router.get("/")
async def index() -> Response:
    """Serves the page. It holds no secrets and asks for an API key if the server needs one."""
    content, policy = page()
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
    return Response(content, media_type="text/html; charset=utf-8", headers=headers)
