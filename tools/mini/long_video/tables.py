"""Tables of what `long_video` measured: means over stories, and differences to `none` with the stories' spread."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tools.mini.claims.results import Row

from .arms import ARMS, LONG, LONGER

COLUMNS = {
    "seam_ratio": "seams",
    "start_ratio": "starts",
    "neighbours": "neighbours",
    "drift": "drift",
    "dynamics": "dynamics",
    "flicker": "flicker",
    "cuts": "cuts",
    "mawe": "MAWE",
    "motion": "motion",
    "stated": "told",
}
TITLES = {
    "240": (LONG, True),
    "240_without_tar": (LONG, False),
    "1200": (LONGER, True),
}


def tables(found: Sequence[Row]) -> dict[str, str]:
    """Returns each table by its name; empty where nothing was measured for it."""
    return {name: _table([row for row in found if _of(row, *what)]) for name, what in TITLES.items()}


def _of(row: Row, frames: int, tar: bool) -> bool:
    return row["case"]["frames"] == frames and row["case"]["tar"] == tar


def _table(found: Sequence[Row]) -> str:
    by_arm: dict[str, list[Row]] = {arm: [row for row in found if row["case"]["arm"] == arm] for arm in ARMS}
    lines = [f"| arm | videos | {' | '.join(COLUMNS.values())} | CPU s |", f"|---|--:|{'--:|' * (len(COLUMNS) + 1)}"]
    for arm, made in by_arm.items():
        if made:
            cells = [_cell(made, name) for name in COLUMNS]
            seconds = np.mean([row["cpu_seconds"] for row in made])
            lines.append(f"| {arm} | {len(made)} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _cell(made: Sequence[Row], name: str) -> str:
    values: list[Any] = [row["numbers"][name] for row in made if row["numbers"][name] is not None]
    if not values:
        return "-"
    mean = float(np.mean(values))
    spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
    return f"{mean:.3g}{spread}"
