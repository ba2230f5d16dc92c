"""Counts the files that three walks through the project enter: `python -m tools.walks`, with `--write` into architecture.md.

Each walk runs in a process of its own under Python's profiler. A file counts where one of its functions runs while no import
is under way. The walks: a prompt from the command line to the mp4; q, k, v to a Triton launch; a job from POST to its file, of
which the rendering is the first walk and what the idle server does anyway is left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "development" / "architecture.md"
CODE = tuple(f"{ROOT / name}{os.sep}" for name in ("vstar_engine", "kernels", "export"))
OPENING, CLOSING = "<!-- walks -->\n", "<!-- /walks -->"
OPTIMIZED = 1  # the flag of a function's code, which modules and class bodies lack
# written by probe(): where every process of the server leaves what it entered, and what says that the job is on its way
FOLDER, SENT = "VSTAR_WALK_FOLDER", "sent"
Entered = dict[tuple[str, str], None]


def importing(frame: FrameType | None) -> bool:
    """Returns whether a frame runs because a module is imported."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def watch(entered: Entered) -> None:
    """Notes every function of this project that any thread enters from now on."""

    def entry(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_flags & OPTIMIZED or not code.co_filename.startswith(CODE):
            return
        if not importing(frame):
            entered.setdefault((code.co_filename, code.co_qualname))

    threading.setprofile(entry)
    sys.setprofile(entry)


def files(entered: Entered) -> list[str]:
    """Lists the files of some functions, in the order in which they were entered."""
    return list(dict.fromkeys(str(Path(file).relative_to(ROOT)) for file, _ in entered))


def prompt_to_mp4() -> list[str]:
    """Walks `generate PROMPT` of the mini model, from the command line's entry to the written file."""
    from vstar_engine.commands.main import main

    entered: Entered = {}
    with tempfile.TemporaryDirectory() as folder:
        watch(entered)
        words = ["generate", "--model", "mini", "a landscape from winter to spring", "--frames", "4", "--steps", "2"]
        code = main([*words, "--out", f"{folder}/walk.mp4"])
        sys.setprofile(None)
    if code:
        raise SystemExit(code)
    return files(entered)


def tensors_to_launch() -> list[str]:
    """Walks from the op on q, k, v to the kernel's launch, in Triton's interpreter."""
    import torch

    from vstar_engine.kernels.temporal_attention import temporal_attention

    q, k, v = torch.randn(3, 1, 16, 2, 1, 16)
    g = torch.ones(16)
    entered: Entered = {}
    watch(entered)
    temporal_attention(q, k, v, g)
    sys.setprofile(None)
    return files(entered)


def probe() -> None:
    """Watches a process of the server; a thread writes what was entered before and after the job is sent."""
    folder = Path(os.environ[FOLDER])
    entered: Entered = {}
    watch(entered)

    def keep() -> None:
        idle: Entered | None = None
        while True:
            time.sleep(0.1)
            if idle is None and (folder / SENT).exists():
                idle = dict(entered)
                entered.clear()
            found = {"idle": list(idle or entered), "job": list(entered) if idle is not None else []}
            part = folder / f"{os.getpid()}.part"
            part.write_text(json.dumps(found))
            part.replace(folder / f"{os.getpid()}.json")

    threading.Thread(target=keep, daemon=True).start()


def post_to_file() -> list[str]:
    """Walks a job from its POST to its file, in the server's processes."""
    import httpx

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sitecustomize.py").write_text("from tools.walks import probe\nprobe()\n")
        path = os.pathsep.join([name, str(ROOT)])
        environment = {**os.environ, "PYTHONPATH": path, FOLDER: name}
        port = 18000 + os.getpid() % 1000
        words = [sys.executable, "-m", "vstar_engine", "serve", "--model", "mini", "--port", str(port), "--max-batch", "1"]
        log = (folder / "log").open("wb")
        server = subprocess.Popen([*words, "--data", f"{name}/data"], env=environment, stdout=log, stderr=log, cwd=name)
        try:
            client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
            until(lambda: client.get("/readyz").status_code == 200)
            time.sleep(10)  # what the server does when nobody asks
            (folder / SENT).touch()
            time.sleep(1)
            fields = {"prompt": "a landscape in winter", "num_frames": 4, "num_inference_steps": 2, "enhance_prompt": False}
            video = client.post("/v1/videos", json=fields).json()["id"]
            until(lambda: any((folder / "data").rglob(f"{video}*.mp4")))
            time.sleep(1)
        finally:
            server.terminate()
            server.wait(60)
        found = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    idle = {tuple(one) for part in found for one in part["idle"]}
    job = {tuple(one): None for part in found for one in part["job"] if tuple(one) not in idle}
    return [file for file in files(job) if file.startswith(("vstar_engine/serving/", "vstar_engine/artifacts/"))]


def until(true: Any, seconds: float = 300) -> None:
    """Waits until something is so."""
    import httpx

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if true():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"not so after {seconds:.0f} s")


WALKS = {
    "a prompt to an mp4": (prompt_to_mp4, {}),
    "q, k, v to a Triton launch": (tensors_to_launch, {"TRITON_INTERPRET": "1"}),
    "a job from POST to its file": (post_to_file, {}),
}


def walked(name: str) -> list[str]:
    """Runs a walk in a process of its own and returns the files that it entered."""
    environment = {**os.environ, **WALKS[name][1]}
    command = [sys.executable, "-m", "tools.walks", "--walk", name]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


def table(found: dict[str, list[str]]) -> str:
    """Lays out the walks for the page."""
    lines = [f"| {name} | {len(entered)} | {', '.join(f'`{file}`' for file in entered)} |" for name, entered in found.items()]
    return "\n".join(["| walk | files entered | in this order |", "|---|--:|---|", *lines])


def main() -> None:
    """Runs the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m tools.walks", description=__doc__.split("\n\n")[0])
    parser.add_argument("--walk", choices=WALKS, help="print one walk's files in a line")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.relative_to(ROOT)}")
    args = parser.parse_args()
    if args.walk:
        print(*WALKS[args.walk][0]())
        return
    made = table({name: walked(name) for name in WALKS})
    print(made)
    if args.write:
        before, _, rest = PAGE.read_text().partition(OPENING)
        PAGE.write_text(f"{before}{OPENING}\n{made}\n\n{CLOSING}{rest.partition(CLOSING)[2]}")


if __name__ == "__main__":
    main()
