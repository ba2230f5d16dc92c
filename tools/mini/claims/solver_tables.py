"""Tables of what `solvers` measured: how far samplers end from many steps, and in what 25 steps of DDIM are better."""

from collections.abc import Iterable

from .results import Row
from .solvers import ARMS, LENGTHS, ODE, PUBLISHED, SDE, SPACINGS, STEPS, Arm
from .tables import COLUMNS, Lines, at, by_story, cell, has, interval, markdown

DISTANCE = {"distance": ("distance",)}
# measures of which less is better; of all others more is
LESS = ("cuts", "distance")
SHOWN = ("dynamics, pixels", "dynamics, factors", "states held", "alignment, changing", "neighbours, pixels")


def chosen(found: list[Row], arm: Arm, spacing: str, steps: int, tar: bool, frames: int) -> list[Row]:
    """Returns the rows of a sampler's videos."""
    wanted = {**vars(arm), "spacing": spacing, "steps": steps, "tar": tar, "frames": frames}
    return [row for row in found if wanted.items() <= row["case"].items()]


def differences(one: list[Row], other: list[Row], path: tuple[str, ...]) -> list[float]:
    """Returns by how much two samplers' videos differ in a measure, of each story that both told."""
    a, b = (by_story([row for row in rows if has(row, path)], at(*path)) for rows in (one, other))
    return [a[story] - b[story] for story in a if story in b]


def worse(one: list[Row], other: list[Row]) -> list[str]:
    """Returns the measures of which the paired interval of a difference lies wholly on the worse side, with that difference."""
    found = []
    for name, path in (COLUMNS | DISTANCE).items():
        values = differences(one, other, path)
        if len(values) > 1:
            _, low, high = interval(values)
            if (low > 0) if name in LESS else (high < 0):
                found.append(f"{name} {cell(values)}")
    return found


def settings() -> Iterable[tuple[int, Arm, str]]:
    """Returns each number of steps, sampler and spacing."""
    return [(steps, arm, spacing) for steps in STEPS for arm in ARMS for spacing in SPACINGS]


def verdicts(found: list[Row], tar: bool, frames: int) -> Lines:
    """A line for each sampler: what it measures worse than 25 steps of DDIM, and what DDIM itself does in as many steps."""
    lines = []
    for steps, arm, spacing in settings():
        base = SDE if arm.stochastic else ODE
        rows, other = chosen(found, arm, spacing, steps, tar, frames), chosen(found, base, "leading", PUBLISHED, tar, frames)
        if rows and other and (arm, spacing, steps) != (base, "leading", PUBLISHED):
            ddim = chosen(found, base, spacing, steps, tar, frames)
            said = ["; ".join(worse(each, other)) or "none" for each in (rows, ddim)]
            stories = len(differences(rows, other, ("held",)))
            lines.append([str(steps), str(arm), spacing, *(said if arm not in (ODE, SDE) else [said[0], "-"]), str(stories)])
    return lines


def against_published(found: list[Row], tar: bool, frames: int) -> Lines:
    """A line for each sampler: its measures less those of the published sampler's 25 steps, paired by story."""
    lines = []
    other = chosen(found, SDE, "leading", PUBLISHED, tar, frames)
    for steps, arm, spacing in settings():
        rows = chosen(found, arm, spacing, steps, tar, frames)
        pairs = [differences(rows, other, COLUMNS[name]) for name in SHOWN]
        if all(pairs) and (arm, spacing, steps) != (SDE, "leading", PUBLISHED):
            lines.append([f"{arm}, {spacing}, {steps} steps", *map(cell, pairs)])
    return lines


def distances(found: list[Row], tar: bool, frames: int, steps: list[int]) -> Lines:
    """A line for each sampler and spacing: its mean distance from many steps, by the number of steps."""
    lines = []
    for arm in ARMS:
        for spacing in SPACINGS:
            each = [chosen(found, arm, spacing, count, tar, frames) for count in steps]
            values = [[at("distance")(row) for row in rows if has(row, ("distance",))] for rows in each]
            if any(values):
                cells = [f"{sum(known) / len(known):.3f}" if known else "" for known in values]
                lines.append([f"{arm}, {spacing}", *cells])
    return lines


def tables(found: list[Row]) -> dict[str, str]:
    """All tables by name, as Markdown, empty where nothing was measured."""
    made = {}
    for frames in LENGTHS:
        for tar, words in ((True, "TAR"), (False, "no TAR")):
            known = [steps for steps in STEPS if any(chosen(found, ODE, "trailing", steps, tar, frames))]
            base = chosen(found, ODE, "leading", PUBLISHED, tar, frames)
            known = sorted({*known, *([PUBLISHED] if base else [])})
            head = f"{frames} frames, {words}"
            parts = {
                "verdicts": (
                    ["steps", "sampler", "spacing", "worse than DDIM's 25 steps in", "DDIM in as many steps", "stories"],
                    verdicts(found, tar, frames),
                ),
                "published": ([f"less DDIM's 25 steps at eta 1, {head}", *SHOWN], against_published(found, tar, frames)),
                "distances": ([f"distance, {head}", *(f"{s} steps" for s in known)], distances(found, tar, frames, known)),
            }
            for name, (columns, lines) in parts.items():
                made[f"solvers-{name}-{frames}-{'tar' if tar else 'plain'}"] = markdown(columns, lines) if lines else ""
    return made
