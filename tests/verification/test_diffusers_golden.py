"""The numbers of diffusers and transformers that lie beside the tests agree, without either library."""

from pathlib import Path

from vstar_engine.commands.main import main

FOLDER = Path(__file__).parent.parent / "golden_diffusers"


def test_every_case_agrees(capsys):
    assert main(["verify", str(FOLDER), "--strict"]) == 0, capsys.readouterr().out
    assert "3 of 3 cases agree" in capsys.readouterr().out
