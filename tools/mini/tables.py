"""Tables of what `claims` measured: means with 95 % intervals by bootstrap over the stories."""

from collections.abc import Sequence
from typing import Any

import numpy as np

PAPER = {0: 1.0, 1: 8.0}
SWEEP = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
LEVELS = ({0: 1.0}, {1: 8.0}, {0: 1.0, 1: 8.0}, {0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0, 2: 1.0})
LENGTHS = (16, 32, 48, 64)
# what `--fast` takes, by itself and together
FASTER = ("guidance-interval", "step-cache", "guidance-interval,step-cache", "fp8", "few-step")
ARMS = {
    "clips": "rendered clips, as trained on",
    "story": "the story, rendered",
    "base": "one prompt, no TAR (base)",
    "tar": "one prompt, TAR",
    "vsp": "states (VSP), no TAR",
    "both": "states and TAR (VSTAR)",
}
DIFFERENCES = (
    ("VSTAR - base, 64 frames", ("both", 64), ("base", 64)),
    ("VSP - base, 64 frames", ("vsp", 64), ("base", 64)),
    ("VSTAR - VSP, 64 frames", ("both", 64), ("vsp", 64)),
    ("TAR - base, 64 frames", ("tar", 64), ("base", 64)),
    ("base, 64 frames - 16", ("base", 64), ("base", 16)),
    ("VSTAR, 64 frames - 16", ("both", 64), ("both", 16)),
)
COLUMNS = {
    "dynamics, pixels": ("pixels", "dynamics"),
    "dynamics, features": ("features", "dynamics"),
    "dynamics, factors": ("factors", "dynamics"),
    "dynamics, DreamSim": ("dreamsim", "dynamics"),
    "neighbours, pixels": ("pixels", "neighbours"),
    "neighbours, features": ("features", "neighbours"),
    "states in order": ("visited",),
    "state at its frame": ("at_anchors",),
    "text alignment": ("alignment",),
    "cuts": ("cuts",),
}
# what the README shows of them
BRIEF = ("dynamics, pixels", "dynamics, factors", "neighbours, pixels", "states in order", "text alignment", "cuts")
SHOWN = (1, 4, 8, 16, 32, 48, 63)
DRAWS = 2000

Columns = dict[str, tuple[str, ...]]


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


def chosen(
    found: list[dict[str, Any]], arm: str, frames: int, sigma: dict[int, float] | None = None, fast: str = ""
) -> list[dict[str, Any]]:
    """The rows of one arm and length, exact unless `fast` says otherwise; TAR with the paper's levels unless `sigma` does."""
    wanted = sigma if sigma is not None else (PAPER if arm in ("tar", "both") else {})
    levels = [[level, value] for level, value in wanted.items()]

    def fits(case: dict[str, Any]) -> bool:
        return (case["arm"], case["frames"], case["sigma"], case.get("fast", "")) == (arm, frames, levels, fast)

    return [row for row in found if fits(row["case"])]


def cells(found: list[dict[str, Any]], columns: Columns) -> list[str]:
    return [cell(list(by_story(found, path).values())) for path in columns.values()]


def small(case: dict[str, Any]) -> bool:
    """Whether a case is of the small set that sigmas and levels are compared on."""
    return case["seed"] == 0 and case["story"] % 2 == 0


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def by_arm(found: list[dict[str, Any]], frames: int, columns: Columns) -> list[list[str]]:
    """A line for each way of telling a story in so many frames."""
    arms = [(words, chosen(found, arm, frames)) for arm, words in ARMS.items()]
    return [[words, *cells(rows, columns), str(len(rows))] for words, rows in arms if rows]


def paired(found: list[dict[str, Any]], columns: Columns) -> list[list[str]]:
    """A line for each difference between two arms or lengths, story by story."""
    lines = []
    for words, one, other in DIFFERENCES:
        line = [words]
        for path in columns.values():
            a, b = by_story(chosen(found, *one), path), by_story(chosen(found, *other), path)
            both = [a[story] - b[story] for story in a if story in b]
            line.append(cell(both) if both else "")
        lines.append(line)
    return lines


def by_setting(found: list[dict[str, Any]], settings: Sequence[dict[int, float]], columns: Columns) -> list[list[str]]:
    """A line for each TAR setting and arm, at 64 frames on the small set."""
    lines = []
    for levels in settings:
        name = ", ".join(f"level {level}: {sigma:g}" for level, sigma in levels.items())
        for arm in ("tar", "both"):
            rows = [row for row in chosen(found, arm, 64, levels) if small(row["case"])]
            if rows:
                lines.append([f"{name} ({'VSTAR' if arm == 'both' else 'one prompt'})", *cells(rows, columns)])
    return lines


def by_fast(found: list[dict[str, Any]], frames: int, columns: Columns) -> list[list[str]]:
    """A line for each of what `--fast` takes, under the exact videos of the same stories and seeds."""
    lines = []
    lossy = {fast: rows for fast in FASTER if (rows := chosen(found, "both", frames, fast=fast))}
    seen = {(row["case"]["story"], row["case"]["seed"]) for rows in lossy.values() for row in rows}
    exact = [row for row in chosen(found, "both", frames) if (row["case"]["story"], row["case"]["seed"]) in seen]
    for words, rows in ({"exact": exact} | lossy).items():
        if rows:
            lines.append([words.replace(",", ", "), *cells(rows, columns), str(len(rows))])
    return lines


def by_interval(found: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each arm: mean similarity, by pixels, of frames so many apart in 64 (Fig. 8 of the paper)."""
    lines = []
    for arm, words in ARMS.items():
        curves = [row["numbers"]["pixels"]["curve"] for row in chosen(found, arm, 64)]
        if curves:
            lines.append([words, *(f"{np.mean([curve[str(apart)] for curve in curves]):.3f}" for apart in SHOWN)])
    return lines


def tables(found: list[dict[str, Any]]) -> dict[str, str]:
    """All tables by name, as Markdown, empty where nothing was measured: mean [95 % interval over stories].

    A measure that some rows lack (DreamSim) is left out.
    """
    columns = {name: path for name, path in COLUMNS.items() if all(path[0] in row["numbers"] for row in found)}
    parts = {
        f"frames-{frames}": ([f"{frames} frames", *columns, "videos"], by_arm(found, frames, columns)) for frames in LENGTHS
    }
    parts["differences"] = (["differences, paired by story", *columns], paired(found, columns))
    parts["sigma"] = (["sigma at level 0, 64 frames", *columns], by_setting(found, [{0: sigma} for sigma in SWEEP], columns))
    parts["levels"] = (["levels, 64 frames", *columns], by_setting(found, LEVELS, columns))
    parts["intervals"] = (["similarity by interval, 64 frames", *map(str, SHOWN)], by_interval(found))
    brief = {name: path for name, path in columns.items() if name in BRIEF}
    parts |= {
        f"fast-{frames}": ([f"`--fast`, VSTAR, {frames} frames", *columns, "videos"], by_fast(found, frames, columns))
        for frames in (16, 64)
    }
    parts["claims"] = (["64 frames", *brief, "videos"], by_arm(found, 64, brief))
    parts["claims-differences"] = (["differences, paired by story", *brief], paired(found, brief))
    return {name: markdown(head, lines) if lines else "" for name, (head, lines) in parts.items()}
