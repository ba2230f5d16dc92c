"""A real headless browser for tests: Debian's Chromium, driven through chromedriver's own protocol."""

import base64
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
# a closed network: without these Chromium asks for hosts of its own at every start
ALONE = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-quic")
SERIOUS = ("SEVERE", "WARNING")


class Browser:
    """One window. What it is asked for is waited for."""

    def __init__(self, http: httpx.Client, size: tuple[int, int], dark: bool, folder: Path):
        self.http = http
        words = ["--headless=new", "--no-sandbox", "--disable-gpu", *ALONE, f"--window-size={size[0]},{size[1]}"]
        words += ["--hide-scrollbars", f"--user-data-dir={folder / 'profile'}"]
        options = {
            "binary": shutil.which("chromium"),
            "args": [*words, *(["--blink-settings=preferredColorScheme=0"] if dark else [])],
            "prefs": {"download.default_directory": str(folder)},
        }
        asked = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self.call("POST", "/session", {"capabilities": {"alwaysMatch": asked}})
        self.session = f"/session/{made['sessionId']}"

    def call(self, method: str, path: str, body: Any = None) -> Any:
        value = self.http.request(method, path, json={} if body is None and method == "POST" else body).json()["value"]
        if isinstance(value, dict) and "error" in value:
            raise RuntimeError(f"{value['error']}: {value['message'][:500]}")
        return value

    def goto(self, url: str) -> None:
        self.call("POST", f"{self.session}/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Runs the body of a function; what it promises is waited for."""
        return self.call("POST", f"{self.session}/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, css: str, seconds: float = 20.0) -> str:
        """Returns the first visible element."""
        script = "return [...document.querySelectorAll(arguments[0])].find(e => e.getClientRects().length) ?? null"
        return self.until(script, css, seconds=seconds)[ELEMENT]

    def until(self, script: str, *arguments: Any, seconds: float = 20.0) -> Any:
        """Returns what a script returns once that is neither null nor false."""
        end = time.monotonic() + seconds
        while (value := self.run(script, *arguments)) in (None, False):
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds:g} s: {script} {arguments}")
            time.sleep(0.05)
        return value

    def click(self, css: str) -> None:
        self.call("POST", f"{self.session}/element/{self.find(css)}/click")

    def type(self, css: str, text: str) -> None:
        self.call("POST", f"{self.session}/element/{self.find(css)}/value", {"text": text})

    def text(self, css: str) -> str:
        return self.call("GET", f"{self.session}/element/{self.find(css)}/text")

    def drag(self, css: str, right: int) -> None:
        """Takes an element with the mouse and moves it by pixels."""
        moves = [{"type": "pointerMove", "duration": 50, "x": right // 2, "y": 0, "origin": "pointer"}] * 2
        self._point("mouse", css, [{"type": "pointerDown", "button": 0}, *moves, {"type": "pointerUp", "button": 0}])

    def hover(self, css: str, right: int = 0) -> None:
        """Rests with the mouse on an element, so many pixels beside its middle."""
        self._point("mouse", css, [], right)

    def take_away(self, css: str, right: int) -> None:
        """Drags an element with a finger, until the system takes the finger for something else."""
        box = self.run("return document.querySelector(arguments[0]).getBoundingClientRect()", css)
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for kind, points in (("touchStart", [x]), ("touchMove", [x + right]), ("touchCancel", [])):
            self.devtools("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y} for x in points])

    def _point(self, kind: str, css: str, then: list[dict[str, Any]], right: int = 0) -> None:
        start = {"type": "pointerMove", "duration": 0, "x": right, "y": 0, "origin": {ELEMENT: self.find(css)}}
        pointer = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": [start, *then]}
        self.call("POST", f"{self.session}/actions", {"actions": [pointer]})

    def devtools(self, command: str, **parameters: Any) -> Any:
        """Asks the browser itself, by the protocol of its developer tools."""
        return self.call("POST", f"{self.session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", f"{self.session}/screenshot")))

    def complaints(self) -> list[str]:
        """Returns what the page's console holds of errors, refused sources among them."""
        found = self.call("POST", f"{self.session}/se/log", {"type": "browser"})
        return [line["message"] for line in found if line["level"] in SERIOUS]


@contextmanager
def browser(folder: Path, size: tuple[int, int] = (1400, 1000), dark: bool = False) -> Iterator[Browser]:
    """Starts a browser for one test; skips where Chromium or its driver is not installed."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}: apt-get install chromium chromium-driver")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            _until_ready(http)
            made = Browser(http, size, dark, folder)
            yield made
            made.call("DELETE", made.session)
    finally:
        driver.terminate()
        driver.wait(20)


def _until_ready(http: httpx.Client) -> None:
    for _ in range(200):
        try:
            if http.get("/status").json()["value"]["ready"]:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise TimeoutError("chromedriver did not start")
