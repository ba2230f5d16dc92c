"""Tables of what `claims` measured: means with 95 % intervals by bootstrap over the stories."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .results import Row
from .stories import STORIES

PAPER = {0: 1.0, 1: 8.0}
SWEEP = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
LEVELS = ({0: 1.0}, {1: 8.0}, {0: 1.0, 1: 8.0}, {0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0, 2: 1.0})
STRENGTHS, STRENGTH_LEVELS, STRENGTH_SWEEP = (1.0, 3.0), (0, 1), (0.5, 8.0)
LENGTHS = (16, 32, 48, 64)
# what `--fast` takes, by itself and together
FASTER = ("guidance-interval", "step-cache", "guidance-interval,step-cache", "fp8", "few-step")
ARMS = {
    "clips": "rendered clips, other scenes",
    "story": "the story, rendered",
    "base": "one prompt, no TAR (base)",
    "tar": "one prompt, TAR",
    "vsp": "states (VSP), no TAR",
    "both": "states and TAR (VSTAR)",
}
# what no measure of a story should be taken in by
DECEITS = {"still": "the story's first frame, still", "shuffled": "the story's frames, shuffled"}
DIFFERENCES = (
    ("VSTAR - base, 64 frames", ("both", 64), ("base", 64)),
    ("VSP - base, 64 frames", ("vsp", 64), ("base", 64)),
    ("VSTAR - VSP, 64 frames", ("both", 64), ("vsp", 64)),
    ("TAR - base, 64 frames", ("tar", 64), ("base", 64)),
    ("rendered clips - base, 64 frames", ("clips", 64), ("base", 64)),
    ("rendered story - base, 64 frames", ("story", 64), ("base", 64)),
    ("base, 64 frames - 16", ("base", 64), ("base", 16)),
    ("TAR, 64 frames - 16", ("tar", 64), ("tar", 16)),
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
    "states held": ("held",),
    "state at its frame": ("at_anchors",),
    "alignment, changing": ("alignment",),
    "alignment, all": ("stated",),
    "cuts": ("cuts",),
}
# what says how well a story is told, which an unrelated clip does not tell
TELLING = ("states in order", "states held", "state at its frame", "alignment, changing", "alignment, all")
# what the README shows of them
BRIEF = ("dynamics, pixels", "dynamics, factors", "neighbours, pixels", "states held", "alignment, changing", "cuts")
GENERATED = ("base", "tar", "vsp", "both")
STORY_COLUMNS = {"dynamics": ("pixels", "dynamics"), "cuts": ("cuts",)}
SHOWN = (1, 4, 8, 15, 16, 31, 32, 47, 48, 63)
MEASURES = ("pixels", "features", "factors", "dreamsim")
DRAWS = 2000
# columns of a table
WIDEST = 6

Columns = dict[str, tuple[str, ...]]
Value = Callable[[Row], float]
Lines = list[list[str]]


def has(row: Row, path: tuple[str, ...]) -> bool:
    return path[0] in row["numbers"]


def at(*path: str) -> Value:
    """Reads the number at a path of a row's numbers."""

    def value(row: Row) -> float:
        found: Any = row["numbers"]
        for name in path:
            found = found[name]
        return float(found)

    return value


def by_story(found: list[Row], value: Value) -> dict[int, float]:
    """Means over the seeds of each story: stories differ, seeds of one story are no independent samples."""
    stories: dict[int, list[float]] = {}
    for row in found:
        stories.setdefault(row["case"]["story"], []).append(value(row))
    return {story: float(np.mean(values)) for story, values in stories.items()}


def interval(values: list[float]) -> tuple[float, float, float]:
    """Returns the mean and the 95 % interval by bootstrap over stories."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(values, (DRAWS, len(values))).mean(1)
    return float(np.mean(values)), float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def cell(values: list[float]) -> str:
    mean, low, high = interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def chosen(
    found: list[Row], arm: str, frames: int, sigma: dict[int, float] | None = None, fast: str = "", strength: float = 1.0
) -> list[Row]:
    """Returns the rows of one arm and length: exact unless `fast` is given, TAR at the paper's levels unless `sigma` is."""
    wanted = sigma if sigma is not None else (PAPER if arm in ("tar", "both") else {})
    settings = [[level, value] for level, value in wanted.items()]

    def fits(case: dict[str, Any]) -> bool:
        of = (case["arm"], case["frames"], case["sigma"], case.get("fast", ""), case.get("strength", 1.0))
        return of == (arm, frames, settings, fast, strength)

    return [row for row in found if fits(row["case"])]


def small(found: list[Row]) -> list[Row]:
    """Returns the rows of the small set that sigmas and levels are compared on."""
    return [row for row in found if row["case"]["seed"] == 0 and row["case"]["story"] % 2 == 0]


def cells(found: list[Row], columns: Columns) -> list[str]:
    """Returns a cell for each column; of rows that lack its measure none, and how many have it where some do."""
    made = []
    for path in columns.values():
        having = [row for row in found if has(row, path)]
        count = f" ({len(having)} videos)" if len(having) < len(found) else ""
        made.append(cell(list(by_story(having, at(*path)).values())) + count if having else "")
    return made


def less(one: list[Row], other: list[Row], columns: Columns) -> list[str]:
    """Returns a cell for each column: the differences of two sets of rows, paired by story over the seeds that both have."""
    made = []
    for path in columns.values():
        a, b = ({(r["case"]["story"], r["case"]["seed"]): r for r in rows if has(r, path)} for rows in (one, other))
        both = a.keys() & b.keys()
        pairs = [by_story([rows[which] for which in sorted(both)], at(*path)) for rows in (a, b)]
        count = f" ({len(both)} videos)" if len(both) < len(one) else ""
        made.append(cell([pairs[0][story] - pairs[1][story] for story in pairs[0]]) + count if both else "")
    return made


def markdown(head: list[str], lines: Lines) -> str:
    """Lays out a table; one wider than WIDEST as several with the same first column."""
    others = len(head) - 1
    tables = -(-others // (WIDEST - 1))
    bounds = [1 + others * i // tables for i in range(tables + 1)]
    parts = []
    for low, high in pairwise(bounds):
        kept = [[line[0], *line[low:high]] for line in lines if tables == 1 or any(line[low:high])]
        parts.append(_table([head[0], *head[low:high]], kept))
    return "\n\n".join(parts)


def _table(head: list[str], lines: Lines) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def unrelated(line: list[str], columns: Columns) -> list[str]:
    """Returns a line without the cells that a clip of another scene has no value for."""
    return ["" if name in TELLING else cell for name, cell in zip(columns, line, strict=True)]


def by_arm(found: list[Row], frames: int, columns: Columns) -> Lines:
    """Returns a line for each way of telling a story in so many frames."""
    lines = []
    for arm, words in (ARMS | DECEITS).items():
        if rows := chosen(found, arm, frames):
            line = cells(rows, columns)
            lines.append([words, *(unrelated(line, columns) if arm == "clips" else line), str(len(rows))])
    return lines


def one_by_one(found: list[Row]) -> Lines:
    """Returns a line for each story: dynamics by pixels of what was generated in 64 frames, and cuts, means over the seeds."""
    arms = [by_story(chosen(found, arm, 64), at(*path)) for path in STORY_COLUMNS.values() for arm in GENERATED]
    told = arms[0] if all(arms) else {}
    return [[f"{story}: {STORIES[story].prompt}", *(f"{arm[story]:.3f}" for arm in arms)] for story in told]


def paired(found: list[Row], columns: Columns) -> Lines:
    """Returns a line for each difference between two arms or lengths, story by story."""
    lines = []
    for words, one, other in DIFFERENCES:
        line = less(chosen(found, *one), chosen(found, *other), columns)
        lines.append([words, *(unrelated(line, columns) if "clips" in (one[0], other[0]) else line)])
    return lines


@dataclass(frozen=True)
class Setting:
    """What TAR does: sigma of each level, and its strength."""

    sigma: dict[int, float]
    strength: float = 1.0

    def __str__(self) -> str:
        levels = ", ".join(f"level {level}: {sigma:g}" for level, sigma in self.sigma.items())
        return levels if self.strength == 1.0 else f"{levels}, strength {self.strength:g}"


def by_setting(found: list[Row], arm: str, frames: int, pairs: list[tuple[Setting, Setting | None]], columns: Columns) -> Lines:
    """Returns the small set without TAR, then how the settings of each pair differ (None: no TAR), paired by story."""

    def of(setting: Setting | None) -> list[Row]:
        if setting is None:
            return small(chosen(found, "base" if arm == "tar" else "vsp", frames))
        return small(chosen(found, arm, frames, setting.sigma, strength=setting.strength))

    told = "one prompt" if arm == "tar" else "states"
    lines = [[f"{told}, no TAR", *cells(of(None), columns)]]
    for one, other in pairs:
        if of(one) and of(other):
            lines.append([f"{told}, {one} - {other or 'no TAR'}", *less(of(one), of(other), columns)])
    return lines if len(lines) > 1 else []


def sweep(sigmas: tuple[float, ...], level: int, strength: float = 1.0) -> list[tuple[Setting, Setting | None]]:
    """Returns each sigma against no TAR, then the narrowest against the widest."""
    settings = [Setting({level: sigma}, strength) for sigma in sigmas]
    return [*((setting, None) for setting in settings), (settings[0], settings[-1])]


def by_fast(found: list[Row], frames: int, columns: Columns) -> Lines:
    """Returns a line for each of what `--fast` takes, under the exact videos of the same stories and seeds."""
    lines = []
    lossy = {fast: rows for fast in FASTER if (rows := chosen(found, "both", frames, fast=fast))}
    seen = {(row["case"]["story"], row["case"]["seed"]) for rows in lossy.values() for row in rows}
    exact = [row for row in chosen(found, "both", frames) if (row["case"]["story"], row["case"]["seed"]) in seen]
    for words, rows in ({"exact": exact} | lossy).items():
        if rows:
            lines.append([words.replace(",", ", "), *cells(rows, columns), str(len(rows))])
    return lines


def by_interval(found: list[Row], frames: int, shown: list[str]) -> Lines:
    """Returns a line for each measure and arm: similarity of frames so many apart (Fig. 8 of the paper)."""
    lines = []
    for measure in MEASURES:
        for arm, words in ARMS.items():
            rows = [row for row in chosen(found, arm, frames) if has(row, (measure,))]
            values = [cell(list(by_story(rows, at(measure, "curve", apart)).values())) for apart in shown] if rows else []
            lines += [[f"{measure}: {words}", *values]] if rows else []
    return lines


def tables(found: list[Row]) -> dict[str, str]:
    """Returns all tables by name, as Markdown, empty where nothing was measured: mean [95 % interval over stories]."""
    columns = {name: path for name, path in COLUMNS.items() if any(has(row, path) for row in found)}
    brief = {name: path for name, path in columns.items() if name in BRIEF}
    levels: list[tuple[Setting, Setting | None]] = [(Setting(sigma), None) for sigma in LEVELS]
    levels += [(Setting(PAPER), Setting({1: 8.0})), (Setting({0: 1.0, 1: 1.0}), Setting(PAPER))]
    levels += [(Setting({0: 1.0, 1: 1.0, 2: 1.0}), Setting({0: 1.0, 1: 1.0}))]
    strengths = [pair for strength in STRENGTHS for level in STRENGTH_LEVELS for pair in sweep(STRENGTH_SWEEP, level, strength)]
    parts: dict[str, tuple[list[str], Lines]] = {}
    for frames in LENGTHS:
        shown = [str(apart) for apart in SHOWN if apart < frames and (apart == frames - 1 or apart % 4 == 0 or apart == 1)]
        parts[f"frames-{frames}"] = ([f"{frames} frames", *columns, "videos"], by_arm(found, frames, columns))
        parts[f"intervals-{frames}"] = ([f"similarity by interval, {frames} frames", *shown], by_interval(found, frames, shown))
    heads = [f"{name}, {arm}" for name in STORY_COLUMNS for arm in ("base", "TAR", "VSP", "VSTAR")]
    parts["stories"] = (["story, 64 frames", *heads], one_by_one(found))
    parts["differences"] = (["differences, paired by story", *columns], paired(found, columns))
    sigmas = sweep(SWEEP, 0)
    for arm in ("tar", "both"):
        parts[f"sigma-{arm}"] = (["sigma at level 0, 64 frames", *columns], by_setting(found, arm, 64, sigmas, columns))
        parts[f"levels-{arm}"] = (["levels, 64 frames", *columns], by_setting(found, arm, 64, levels, columns))
    for frames in (16, 64):
        head = [f"level and strength, {frames} frames", *columns]
        parts[f"strength-{frames}"] = (head, by_setting(found, "both", frames, strengths, columns))
        parts[f"fast-{frames}"] = ([f"`--fast`, VSTAR, {frames} frames", *columns, "videos"], by_fast(found, frames, columns))
    parts["claims"] = (["64 frames", *brief, "videos"], by_arm(found, 64, brief))
    parts["claims-differences"] = (["differences, paired by story", *brief], paired(found, brief))
    return {name: markdown(head, lines) if lines else "" for name, (head, lines) in parts.items()}
