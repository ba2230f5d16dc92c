"""A stand-in for a back end's builder, which writes one file, and what its tests ask of it."""

from dataclasses import dataclass
from pathlib import Path

from vstar_engine.config.models import MODELS
from vstar_engine.export.build_settings import Estimate, Settings
from vstar_engine.export.builders import Report

SETTINGS = Settings(MODELS["mini"], "inductor", size=(32, 64))


@dataclass
class Builder:
    """Counts its builds; `fault` is raised after the file is written."""

    count: int = 0
    fault: BaseException | None = None

    def options(self, settings):
        return {}

    def estimate(self, settings):
        return Estimate(1.0, 2**20, 2**30, "one build")

    def build(self, settings, weights, folder: Path, report: Report):
        self.count += 1
        report("building")
        (folder / "unet.pt2").write_bytes(b"engine")
        if self.fault:
            raise self.fault
        return {"nodes": 3}


def names(folder):
    """Returns the names in a folder, in order."""
    return sorted(path.name for path in folder.iterdir())
