"""Tables of what `claims` measured: means with 95 % intervals by bootstrap over the stories."""

from typing import Any

import numpy as np

PAPER = {0: 1.0, 1: 8.0}
SWEEP = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
LEVELS = ({0: 1.0}, {1: 8.0}, {0: 1.0, 1: 8.0}, {0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0, 2: 1.0})
ARMS = {
    "clips": "rendered clips, as trained on",
    "story": "the story, rendered",
    "base": "one prompt, no TAR (base)",
    "tar": "one prompt, TAR",
    "vsp": "states (VSP), no TAR",
    "both": "states and TAR (VSTAR)",
}
COLUMNS = {
    "dynamics, pixels": ("pixels", "dynamics"),
    "dynamics, features": ("features", "dynamics"),
    "dynamics, factors": ("factors", "dynamics"),
    "neighbours, pixels": ("pixels", "neighbours"),
    "neighbours, features": ("features", "neighbours"),
    "states in order": ("visited",),
    "state at its frame": ("at_anchors",),
    "text alignment": ("alignment",),
    "cuts": ("cuts",),
}
DRAWS = 2000


def value(row: dict[str, Any], path: tuple[str, ...]) -> float:
    found = row["numbers"]
    for name in path:
        found = found[name]
    return float(found)


def by_story(found: list[dict[str, Any]], path: tuple[str, ...]) -> dict[int, float]:
    """Means over the seeds of each story: stories differ, seeds of one story are no independent samples."""
    stories: dict[int, list[float]] = {}
    for row in found:
        stories.setdefault(row["case"]["story"], []).append(value(row, path))
    return {story: float(np.mean(values)) for story, values in stories.items()}


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval by bootstrap over stories."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(values, (DRAWS, len(values))).mean(1)
    return float(np.mean(values)), float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def cell(values: list[float]) -> str:
    mean, low, high = interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def chosen(found: list[dict[str, Any]], arm: str, frames: int, sigma: dict[int, float] | None = None) -> list[dict[str, Any]]:
    """The rows of one arm and length; TAR with the paper's levels unless `sigma` says otherwise."""
    wanted = sigma if sigma is not None else (PAPER if arm in ("tar", "both") else {})
    levels = [[level, value] for level, value in wanted.items()]
    return [row for row in found if (row["case"]["arm"], row["case"]["frames"], row["case"]["sigma"]) == (arm, frames, levels)]


def line_of(found: list[dict[str, Any]]) -> list[str]:
    return [cell(list(by_story(found, path).values())) for path in COLUMNS.values()]


def small(case: dict[str, Any]) -> bool:
    """Whether a case is of the small set that sigmas and levels are compared on."""
    return case["seed"] == 0 and case["story"] % 2 == 0


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def tables(found: list[dict[str, Any]]) -> str:
    """All tables as Markdown: mean [95 % interval over stories]."""
    parts = []
    for frames in (16, 32, 48, 64):
        lines = []
        for arm, words in ARMS.items():
            rows_of = chosen(found, arm, frames)
            if rows_of:
                lines.append(
                    [words, *(cell(list(by_story(rows_of, path).values())) for path in COLUMNS.values()), str(len(rows_of))]
                )
        if lines:
            parts += [f"**{frames} frames**", markdown([f"{frames} frames", *COLUMNS, "videos"], lines)]
    paired = [
        ("VSTAR - base, 64 frames", ("both", 64), ("base", 64)),
        ("VSP - base, 64 frames", ("vsp", 64), ("base", 64)),
        ("VSTAR - VSP, 64 frames", ("both", 64), ("vsp", 64)),
        ("TAR - base, 64 frames", ("tar", 64), ("base", 64)),
        ("base, 64 frames - 16", ("base", 64), ("base", 16)),
        ("VSTAR, 64 frames - 16", ("both", 64), ("both", 16)),
    ]
    lines = []
    for words, one, other in paired:
        line = [words]
        for path in COLUMNS.values():
            a, b = by_story(chosen(found, *one), path), by_story(chosen(found, *other), path)
            line.append(cell([a[story] - b[story] for story in a if story in b]))
        lines.append(line)
    parts += ["**Differences, paired by story**", markdown(["difference", *COLUMNS], lines)]
    for title, settings in (("sigma at level 0", [{0: sigma} for sigma in SWEEP]), ("levels", list(LEVELS))):
        lines = []
        for levels in settings:
            for arm in ("tar", "both"):
                rows_of = [row for row in chosen(found, arm, 64, levels) if small(row["case"])]
                if rows_of:
                    name = ", ".join(f"level {level}: {sigma:g}" for level, sigma in levels.items())
                    lines.append(
                        [f"{name} ({arm})", *(cell(list(by_story(rows_of, path).values())) for path in COLUMNS.values())]
                    )
        if lines:
            parts += [f"**TAR by {title}, 64 frames**", markdown([title, *COLUMNS], lines)]
    return "\n\n".join(parts)
