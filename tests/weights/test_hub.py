"""Weights from the Hub, by a small server of its protocol: ids, downloads, one conversion, and a sentence for each failure."""

import errno
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("huggingface_hub")

import huggingface_hub.constants

from support.hub_server import COMMIT, Hub, serving
from vstar_engine import Engine
from vstar_engine.artifacts.manifest import read_stated
from vstar_engine.commands.main import main
from vstar_engine.config.models import MODELS
from vstar_engine.errors import CheckpointError, DownloadError, OutputError
from vstar_engine.weights import converted, hub, random_checkpoint, sources
from vstar_engine.weights.hub import HubId

TINY = "somebody/tiny"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a tiny official checkpoint, as a model on the Hub holds it."""
    folder = tmp_path_factory.mktemp("published")
    random_checkpoint.write(MODELS["mini"], folder / "model.ckpt", seed=3)
    (folder / "README.md").write_text("a card")
    return folder


@pytest.fixture
def server(published, tmp_path, monkeypatch):
    """The Hub on this machine, with empty caches of its own."""
    with serving(Hub({TINY: published})) as made:
        for name, value in {
            "ENDPOINT": made.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": made.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv(converted.ENVIRONMENT, str(tmp_path / "converted"))
        yield made


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("owner/name", HubId("owner/name")),
        ("owner/na.me-2@main", HubId("owner/na.me-2", "main")),
        ("owner/name@v1:a/model.ckpt", HubId("owner/name", "v1", "a/model.ckpt")),
        ("owner/name:model.safetensors", HubId("owner/name", None, "model.safetensors")),
        ("weights", None),
        ("/tmp/weights", None),
        ("a/b/c", None),
        ("folder/model.ckpt", None),
        ("../weights", None),
    ],
)
def test_an_id_is_owner_and_name(text, wanted):
    assert HubId.parse(text) == wanted


def test_a_checkpoint_is_pulled_and_converted_once(server, capsys):
    assert main(["pull", TINY, "--model", "mini"]) == 0
    said = capsys.readouterr()
    assert f"{TINY} (commit {COMMIT}; licence: apache-2.0)" in said.err
    assert f"{TINY}@{COMMIT}" in said.out
    asked = len(server.requests)
    engine = Engine.load("mini", weights=TINY)
    assert len(server.requests) == asked, "what was pulled is found without asking the Hub"
    (entry,) = converted.entries()
    assert engine.path == entry.folder
    assert sources.present(f"{TINY}@{COMMIT}", "mini", "float32") == entry.folder
    assert entry.manifest["source"]["hub"] == {"id": TINY, "revision": None, "commit": COMMIT, "file": None}
    assert main(["weights", "--json"]) == 0
    assert f'"{TINY}@{COMMIT}"' in capsys.readouterr().out
    assert main(["weights", "rm", entry.folder.name]) == 0
    assert not entry.folder.exists()
    assert sources.present(TINY, "mini", "float32") is None


def test_a_file_is_converted_once_and_found_by_its_content(server, published, tmp_path):
    first = sources.obtain(published / "model.ckpt", "mini")
    made = (first / "manifest.json").stat().st_mtime_ns
    shutil.copy(published / "model.ckpt", tmp_path / "copy.ckpt")
    assert sources.present(published / "model.ckpt", "mini", "float32") == first
    assert sources.present(tmp_path / "copy.ckpt", "mini", "float32") is None
    assert sources.obtain(tmp_path / "copy.ckpt", "mini") == first
    assert (first / "manifest.json").stat().st_mtime_ns == made
    assert read_stated(first)["dtype"] == "float16"
    os.utime(tmp_path / "copy.ckpt", (1, 1))
    assert sources.present(tmp_path / "copy.ckpt", "mini", "float32") is None


def test_an_existing_path_wins_over_an_id(server, published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(published, tmp_path / TINY)
    assert sources.hub_id(TINY, "mini") is None
    shutil.rmtree(tmp_path / TINY)
    assert sources.hub_id(TINY, "mini") == HubId(TINY)


def test_without_a_terminal_nothing_is_downloaded_unasked(server, capsys):
    wanted = ["generate", "--states", "snow", "--model", "mini", "--weights", TINY]
    assert main(wanted) == CheckpointError.exit_code
    assert f"fetch them with `vstar-engine pull {TINY}`, or give --yes" in capsys.readouterr().err
    assert server.requests == []


def test_a_snapshot_of_the_cache_serves_without_a_network(server, monkeypatch):
    snapshot = hub.look_up(HubId(TINY))
    folder = hub.download(snapshot, snapshot.wanted())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked, again = len(server.requests), hub.look_up(HubId(TINY))
    assert (again.commit, again.wanted()) == (COMMIT, ["model.ckpt"])
    assert hub.download(again, again.wanted()) == folder
    assert len(server.requests) == asked


FAULTS = {
    "gated": ((403, "GatedRepo"), r"is gated: accept its terms at http://\S+/somebody/tiny, and set HF_TOKEN"),
    "unauthorised": ((401, "RepoNotFound"), r"no file or folder \S+ here, and no model somebody/tiny on http://\S+ .*401"),
    "bad token": ((401, ""), r"does not accept the token for somebody/tiny \(401\): set HF_TOKEN to a valid one"),
    "forbidden": ((403, ""), r"does not allow this token to read somebody/tiny \(403\)"),
    "absent": ((404, "RepoNotFound"), r"no file or folder somebody/tiny here, and no model .*404.*look at the name"),
    "broken": ((500, ""), r"is too busy or broken for somebody/tiny \(500\)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_refusal_is_one_sentence_without_the_token(server, name, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    server.faults[TINY], said = FAULTS[name]
    with pytest.raises(DownloadError, match=said) as raised:
        sources.obtain(TINY, "mini")
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value) + caplog.text
    assert list(converted.entries()) == []


@pytest.mark.parametrize(
    ("id", "error", "said"),
    [
        (f"{TINY}@v9", DownloadError, "has no revision 'v9'"),
        (f"{TINY}:other.ckpt", CheckpointError, "holds no other.ckpt; it holds README.md, model.ckpt"),
        ("somebody/-tiny-", DownloadError, "is no id of a model"),
    ],
)
def test_what_is_not_there_is_named(server, id, error, said):
    with pytest.raises(error, match=said):
        sources.obtain(id, "mini")


def test_no_network_is_one_sentence(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"http://127.0.0.1:9 cannot be reached for somebody/tiny .* holds no snapshot"):
        sources.obtain(TINY, "mini")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE forbids"):
        sources.obtain(TINY, "mini")


def test_a_cut_download_is_resumed_by_the_next_run(server, published):
    size = (published / "model.ckpt").stat().st_size
    server.cut["model.ckpt"] = size // 16
    with pytest.raises(DownloadError, match=r"was cut .*run it again, and it resumes"):
        sources.obtain(TINY, "mini")
    assert list(converted.entries()) == []
    server.cut.clear()
    snapshot = hub.look_up(HubId(TINY))
    whole = hub.download(snapshot, snapshot.wanted()) / "model.ckpt"
    assert whole.read_bytes() == (published / "model.ckpt").read_bytes()


def test_bytes_that_the_hub_does_not_state_are_refused(server, published, monkeypatch):
    snapshot = hub.look_up(HubId(TINY))
    wrong = type(snapshot)(snapshot.id, snapshot.commit, snapshot.sizes, {"model.ckpt": "0" * 64})
    monkeypatch.setattr(hub, "look_up", lambda id: wrong)
    with pytest.raises(DownloadError, match="its sha256 is not the Hub's"):
        sources.obtain(TINY, "mini")


def test_a_small_disk_is_found_before_the_download(server, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 2**20, 1000))
    with pytest.raises(OutputError, match=r"GB are needed on the disk of .*which has 0\.0 GB free"):
        sources.obtain(TINY, "mini")
    assert not any("resolve" in request for request in server.requests)


def test_a_full_disk_is_one_sentence():
    with pytest.raises(DownloadError, match=r"is full \(.* GB free\): make room, or set HF_HOME"), hub.explained(HubId(TINY)):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
def test_a_new_user_pulls_and_generates(server, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    how = ["generate", "--model", "mini", "--weights", TINY, "--yes", "--states", "snow", "--frames", "2", "--size", "32x32"]
    out = tmp_path / "new.mp4"
    command = [sys.executable, "-m", "vstar_engine", *how, "--steps", "1", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert out.is_file()
    assert main(["inspect", str(out)]) == 0
