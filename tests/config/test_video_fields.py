"""One table of a video's settings: a new one needs the dataclass that holds it and a row, and is then on every face."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vstar_engine.config.sampling import Sampling, Tar
from vstar_engine.config.video_fields import BODY, HOLDERS, STATE, TAR, VIDEO_FIELDS, request_from

ROOT = Path(__file__).parents[2]
# what a developer writes for a new setting, in each of two files: after which line, and what
CHANGES = {
    "sampling.contrast": {
        "sampling.py": ("    fast: tuple[str, ...] = ()\n", "    contrast: float = 1.0\n"),
        "video_fields.py": (
            "VIDEO_FIELDS = [\n",
            '    VideoField("sampling.contrast", "how far from grey", "contrast", bounds={"ge": 0, "le": 4}),\n',
        ),
    },
    "contrast": {
        "request.py": ("    fps: float = 8.0\n", "    contrast: float | None = None\n"),
        "video_fields.py": (
            "VIDEO_FIELDS = [\n",
            '    VideoField("contrast", "how far from grey", "contrast", bounds={"ge": 0, "le": 4}),\n',
        ),
    },
}
FACES = """
import asyncio, contextlib, io, json, sys
from fastapi import FastAPI
from vstar_engine.commands.main import build_parser, main
from vstar_engine.commands.remote_jobs import bodies
from vstar_engine.config.models import MODELS
from vstar_engine.serving.http import app
from vstar_engine.serving.http.request_to_job import Resolver, remixed
from vstar_engine.serving.http.routes import router
from vstar_engine.serving.http.schema import CreateVideo, RemixVideo
from vstar_engine.serving.http.video_object import video
from vstar_engine.serving.jobs.job import Job
from vstar_engine.serving.queue.stored_job import StoredJob

found = {}

def said(*words):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(words) == 0
    return out.getvalue()

tiny = "generate --model mini --states snow --frames 2 --size 32x32 --steps 1 --contrast 2".split()
found["help"] = build_parser("generate")[1]["generate"].format_help()
found["settings in force"] = said(*tiny, "--print-config")
said(*tiny)
*provenance, found["command"] = said("inspect", "vstar.mp4").splitlines()
place = json.loads("".join(provenance))["request"]
found["provenance"] = {**place, **place["sampling"]}["contrast"]
found["submit"] = bodies(build_parser("submit")[0].parse_args(["submit", "snow", "--contrast", "2"]))[0]["contrast"]

body, resolver = CreateVideo.model_validate({"prompt": "snow", "contrast": 2.0}, strict=True), Resolver(MODELS["mini"])
job = asyncio.run(resolver.with_states(resolver.plain(body, "snow", "", ""), body))
found["stored"] = json.loads(json.dumps(job.to_json()))["contrast"]
request = Job.from_json(job.to_json()).request()
found["engine"] = (request if hasattr(request, "contrast") else request.sampling).contrast
found["shown"] = video(StoredJob(job, 0), None, None).model_dump(mode="json")["contrast"]
found["remix"] = remixed(job, RemixVideo(prompt="rain"), "rain").contrast
found["another remix"] = remixed(job, RemixVideo(prompt="rain", contrast=3.0), "rain").contrast
found["left out"] = resolver.plain(CreateVideo(prompt="snow"), "snow", "", "").contrast
api = FastAPI()
api.include_router(router)
schemas = app._openapi(api, keyed=False)["components"]["schemas"]
found["openapi"] = {name: schemas[name]["properties"]["contrast"] for name in ("CreateVideo", "RemixVideo", "VideoObject")}
json.dump(found, sys.stdout)
"""


@pytest.fixture(params=CHANGES)
def checkout(tmp_path, request):
    """A checkout with a setting more, whose other files are ours, and that setting's default."""
    changes = CHANGES[request.param]
    package, here = tmp_path / "vstar_engine", ROOT / "vstar_engine"
    (package / "config").mkdir(parents=True)
    shared = [ROOT / name for name in ("pyproject.toml", "kernels", "export", "bench")]
    for path in [*shared, *here.iterdir(), *(here / "config").iterdir()]:
        link = tmp_path / path.relative_to(ROOT)
        if not link.exists() and path.name not in changes:
            link.symlink_to(path)
    for name, (after, line) in changes.items():
        text = (here / "config" / name).read_text()
        assert text.count(after) == 1
        (package / "config" / name).write_text(text.replace(after, after + line))
    return tmp_path, {"sampling.contrast": 1.0, "contrast": None}[request.param]


def test_a_new_setting_takes_two_files(checkout, tmp_path_factory):
    import support.serve_packages  # noqa: F401 - skips where they are missing

    folder, default = checkout
    # -S: an editable installation's hook would come before the checkout
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("VSTAR_")}
    environ["PYTHONPATH"] = os.pathsep.join([str(folder), *libraries])
    done = subprocess.run(
        [sys.executable, "-S", "-c", FACES],
        cwd=tmp_path_factory.mktemp("videos"),
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "--contrast CONTRAST   how far from grey" in found.pop("help")
    assert "contrast = 2.0\n" in found.pop("settings in force")
    assert " --contrast=2.0 " in found.pop("command")
    document = found.pop("openapi")
    shown = document.pop("VideoObject")
    assert shown.get("anyOf", [shown])[0]["type"] == "number"
    for taken in document.values():
        assert taken["description"] == "how far from grey"
        assert {"type": "number", "minimum": 0, "maximum": 4} in taken["anyOf"]
    assert (found.pop("another remix"), found.pop("left out")) == (3.0, default)
    assert found == dict.fromkeys(("provenance", "submit", "stored", "engine", "shown", "remix"), 2.0)


def test_each_setting_has_a_row():
    """What the dataclasses hold and the table lacks would be asked for nowhere."""
    inner = [name for name in HOLDERS if name and name != "tar"]
    held = {f"{place}.{name}".lstrip(".") for place, holder in HOLDERS.items() for name in holder.__dataclass_fields__}
    assert {row.path for row in VIDEO_FIELDS} == held - set(inner)


@pytest.mark.parametrize("name", ["path", "option", "http"])
def test_no_two_settings_share_a_name(name):
    names = [getattr(row, name) for row in VIDEO_FIELDS if getattr(row, name) is not None]
    assert len(set(names)) == len(names)
    assert {row.place for row in VIDEO_FIELDS} == {BODY, TAR, STATE, None}


def test_what_is_left_out_has_its_default():
    request = request_from({"states": ("snow",), "sampling.steps": 7, "tar": None})
    assert (request.sampling, request.tar, request.frames) == (Sampling(7), None, 64)
    assert request_from({"states": ("snow",)}).tar == Tar()
