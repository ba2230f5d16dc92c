"""Results as rows of JSON, one a video, each bound to the weights that made it."""

import json
from pathlib import Path
from typing import Any

from vstar_engine.artifacts.files import write_aside
from vstar_engine.artifacts.manifest import WEIGHTS, read_manifest
from vstar_engine.weights import bundled

Row = dict[str, Any]


def key(content: Row) -> str:
    return json.dumps(content, sort_keys=True)


def bundled_weights() -> str:
    """Returns the name of the bundled weights, as an engine states it."""
    return str(read_manifest(bundled.FOLDER / "mini", WEIGHTS)["source"]["sha256"])


def rows(path: Path) -> list[Row]:
    """Returns the newest row of each video; ValueError where other weights than the bundled ones made one."""
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    ours = bundled_weights()
    others = [row["weights"] for row in found if row["weights"] != ours]
    if others:
        raise ValueError(
            f"{path}: {len(others)} of {len(found)} rows were made with weights {others[0][:12]}, the bundled ones are "
            f"{ours[:12]}; move the file away and measure anew"
        )
    return list({key(row["case"]): row for row in found}.values())


def without_replaced(path: Path) -> None:
    """Writes the file again without the rows that newer ones replaced."""
    kept = rows(path)
    with write_aside(path) as aside:
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
