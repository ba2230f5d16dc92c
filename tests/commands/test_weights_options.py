"""Weights are downloaded after a yes, and named by the command that fetches them where nobody can say it."""

import io
import sys
from types import SimpleNamespace

import pytest

from vstar_engine.commands import weights_options
from vstar_engine.commands.main import main
from vstar_engine.errors import CheckpointError
from vstar_engine.weights.hub import HubId
from vstar_engine.weights.sources import Offer

OFFER = Offer(HubId("owner/name"), "c0ffee", "apache-2.0", 7_400_000_000, 14_800_000_000, 20_000_000_000)


def test_an_offer_says_size_licence_and_disk():
    said = str(OFFER)
    assert "owner/name (commit c0ffee; licence: apache-2.0): 7.4 GB to download" in said
    assert "14.8 GB of disk needed with the conversion, 20.0 GB free" in said


@pytest.mark.parametrize(("answer", "agreed"), [("y\n", True), ("YES\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_only_yes_is_a_yes(monkeypatch, capsys, answer, agreed):
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    if agreed:
        weights_options.question(OFFER)
    else:
        with pytest.raises(CheckpointError, match="owner/name was not downloaded, as nobody said yes"):
            weights_options.question(OFFER)
    assert "Download it? [y/N]" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["videocrafter2", "modelscope", "zeroscope"])
def test_a_model_without_weights_names_the_command(model, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("VSTAR_WEIGHTS_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    assert main(["generate", "--model", model, "--states", "snow", "--out", str(tmp_path / "a.mp4")]) == 3
    said = capsys.readouterr().err
    assert f"model {model} comes without weights" in said
    assert f"`vstar-engine pull {model}`" in said
    assert "licence: " in said


def test_what_is_bundled_needs_no_pull(capsys):
    assert main(["pull", "mini"]) == 2
    assert "comes with its weights" in capsys.readouterr().err


def test_removing_names_what_is_there(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("VSTAR_WEIGHTS_CACHE", str(tmp_path / "cache"))
    assert main(["weights", "rm", "../somewhere"]) == 3
    assert "there are no converted weights ../somewhere" in capsys.readouterr().err
    assert main(["weights"]) == 0
    assert "0 in" in capsys.readouterr().out
