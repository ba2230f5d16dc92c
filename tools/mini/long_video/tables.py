"""Tables of what `long_video` measured: means over stories and their standard deviation."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tools.mini.claims.results import Row

from .arms import ARMS, LONG, LONGER

SEAMS = {"seam_ratio": "seams", "start_ratio": "starts", "cuts": "cuts"}
CHANGE = {"drift": "drift", "dynamics": "dynamics", "flicker": "flicker", "mawe": "MAWE", "stated": "told"}
# frames, and whether TAR is on, by the name of a table
TITLES = {"240": (LONG, True), "240_without_tar": (LONG, False), "1200": (LONGER, True)}


def tables(found: Sequence[Row]) -> dict[str, str]:
    """Returns two tables of each length, of seams and of change, by their names; empty where nothing was measured."""
    made = {}
    for name, what in TITLES.items():
        rows = [row for row in found if _of(row, *what)]
        made[name] = _table(rows, SEAMS, True)
        made[f"{name}_change"] = _table(rows, CHANGE)
    return made


def _of(row: Row, frames: int, tar: bool) -> bool:
    return row["case"]["frames"] == frames and row["case"]["tar"] == tar


def _table(found: Sequence[Row], columns: dict[str, str], cost: bool = False) -> str:
    """Lists the arms with a column for each measure; `cost` adds how many videos there are and their CPU time."""
    head = ["arm", *(["videos"] if cost else []), *columns.values(), *(["CPU s"] if cost else [])]
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    for arm in ARMS:
        made = [row for row in found if row["case"]["arm"] == arm]
        if made:
            cells = [_cell(made, name) for name in columns]
            seconds = f"{np.mean([row['cpu_seconds'] for row in made]):.0f}"
            lines.append(f"| {' | '.join([arm, str(len(made)), *cells, seconds] if cost else [arm, *cells])} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _cell(made: Sequence[Row], name: str) -> str:
    values: list[Any] = [row["numbers"][name] for row in made if row["numbers"][name] is not None]
    if not values:
        return "-"
    mean = float(np.mean(values))
    spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
    return f"{mean:.3g}{spread}"
