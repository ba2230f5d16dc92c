"""Plots of result rows: the roofline, time and memory against frames, and the ladder as a waterfall."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vstar_engine.bench.harness.rows import OK, ResultRow
from vstar_engine.errors import MissingLibrary

from .table_cells import grouped, machine_words
from .tables import ADDED, CEILINGS, RUNGS

# one hash for all ids of an SVG, so that the same rows give the same bytes
SALT = "vstar-engine"


def pyplot() -> Any:
    """Returns matplotlib without a display."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingLibrary(f"plots need matplotlib ({error}); pip install matplotlib") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = SALT
    from matplotlib import pyplot

    return pyplot


@dataclass(frozen=True)
class Plot:
    """A plot that rows can fill: its file's name without the ending, what it shows, and how to draw it."""

    name: str
    words: str
    fill: Callable[[Any], None]


def planned(rows: Sequence[ResultRow]) -> list[Plot]:
    """Lists the plots that the rows can fill."""
    timed = [row for row in rows if row.status == OK and "median" in row.numbers]
    attention = [
        row
        for row in timed
        if row.suite == "kernels" and row.case["op"] == "temporal_attention" and row.provider not in CEILINGS
    ]
    ladder = [row for row in timed if row.suite == "pipeline" and row.case["part"] == "ladder" and row.provider in RUNGS]
    plots = []
    for group in grouped(attention, _series):
        if len({row.case["frames"] for row in group}) == 1:  # no curve
            continue
        slug, words = _slug(group[0]), _words(group[0])
        plots.append(Plot(f"roofline-{slug}", f"roofline of {words}", partial(roofline, group)))
        time = partial(against_frames, group, "median", 1e3, "milliseconds")
        plots.append(Plot(f"time-{slug}", f"time against frames of {words}", time))
        if any(row.numbers.get("peak_bytes") for row in group):
            memory = partial(against_frames, group, "peak_bytes", 2**-20, "peak MiB")
            plots.append(Plot(f"memory-{slug}", f"memory against frames of {words}", memory))
    for group in grouped(ladder, lambda row: (row.case["model"], row.case["frames"], row.dtype, machine_words(row))):
        case = group[0].case
        words = f"ladder of {case['model']} at {case['frames']} frames, {group[0].dtype}, {machine_words(group[0])}"
        name = f"ladder-{case['model']}-{case['frames']}f-{group[0].dtype}-{_machine(group[0])}"
        plots.append(Plot(name, words, partial(waterfall, group)))
    return plots


def draw(rows: Sequence[ResultRow], folder: Path, ending: str) -> list[Path]:
    """Draws every plot that the rows can fill and returns their files."""
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for plot in planned(rows):
        figure, axes = plt.subplots(figsize=(7, 4.5))
        plot.fill(axes)
        path = folder / f"{plot.name}.{ending}"
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if ending == "svg" else {"Software": None})
        plt.close(figure)
        written.append(path)
    return written


def links(rows: Sequence[ResultRow], spread: bool = False, kind: str = "") -> list[str]:
    """Returns a document's links to the plots of one kind, in the folder `plots` beside it."""
    return [f"![{plot.words}](plots/{plot.name}.svg)" for plot in planned(rows) if plot.name.startswith(kind)]


def _series(row: ResultRow) -> Any:
    case = row.case
    return case["level"], case["layout"], case["batch"], row.dtype, machine_words(row)


def _slug(row: ResultRow) -> str:
    case = row.case
    return f"level{case['level']}-{case['layout']}-b{case['batch']}-{row.dtype}-{_machine(row)}"


def _machine(row: ResultRow) -> str:
    """Names the row's machine as a part of a file's name."""
    return re.sub("[^a-z0-9]+", "-", machine_words(row).lower()).strip("-")


def _words(row: ResultRow) -> str:
    case = row.case
    return (
        f"temporal attention, level {case['level']}, {case['layout']}, batch {case['batch']}, {row.dtype}, {machine_words(row)}"
    )


def roofline(rows: Sequence[ResultRow], axes: Any) -> None:
    """Draws FLOP/s over FLOPs per byte under the ceilings measured in the same contests."""
    bandwidth = max(row.ceilings["bytes_per_second"] for row in rows)
    peak = max(row.ceilings["flops_per_second"] for row in rows)
    measured = [row for row in rows if row.numbers.get("flops_per_second")]
    intensity = {row.run + row.key: row.numbers["flops_per_second"] / row.numbers["bytes_per_second"] for row in measured}
    span = [min(intensity.values()) / 2, max(*intensity.values(), peak / bandwidth) * 2]
    ridge = sorted({*span, peak / bandwidth})
    axes.plot(ridge, [min(peak, bandwidth * x) / 1e9 for x in ridge], color="black", label="ceilings, as measured")
    for group in grouped(measured, lambda row: row.provider):
        x = [intensity[row.run + row.key] for row in group]
        axes.plot(x, [row.numbers["flops_per_second"] / 1e9 for row in group], "o", markersize=4, label=group[0].provider)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must move", ylabel="GFLOP/s", title=_words(rows[0]))
    _finish(axes, sorted(set(intensity.values())))


def against_frames(rows: Sequence[ResultRow], number: str, scale: float, words: str, axes: Any) -> None:
    """Draws a number against the frames, a line a provider; times with their 20th to 80th percentile."""
    for group in grouped([row for row in rows if row.numbers.get(number)], lambda row: row.provider):
        group.sort(key=lambda row: row.case["frames"])
        frames = [row.case["frames"] for row in group]
        axes.plot(frames, [row.numbers[number] * scale for row in group], "o-", markersize=3, label=group[0].provider)
        if number == "median":
            low, high = ([row.numbers[name] * scale for row in group] for name in ("p20", "p80"))
            axes.fill_between(frames, low, high, alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel="frames", ylabel=words, title=_words(rows[0]))
    _finish(axes, sorted({row.case["frames"] for row in rows}))


def _finish(axes: Any, ticks: Sequence[float]) -> None:
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.minorticks_off()
    axes.title.set_fontsize(8)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def waterfall(rows: Iterable[ResultRow], axes: Any) -> None:
    """Draws the ladder: what every improvement takes off the step before it, what is left, and the network built anew."""
    group = sorted(rows, key=lambda row: RUNGS.index(row.provider))
    steps, others = ([row for row in group if (row.provider in ADDED) is added] for added in (True, False))
    before = 0.0
    for place, row in enumerate(steps):
        now = row.numbers["median"]
        first = place == 0
        color = "tab:gray" if first else "tab:green" if now <= before else "tab:red"
        axes.bar(place, now if first else abs(before - now), bottom=0 if first else min(now, before), color=color)
        axes.text(place, max(now, before), f"{now:.3g} s", ha="center", va="bottom", fontsize=7)
        before = now
    axes.bar(len(steps), before, color="tab:blue")
    for place, row in enumerate(others, len(steps) + 1):
        axes.bar(place, row.numbers["median"], color="tab:blue")
        axes.text(place, row.numbers["median"], f"{row.numbers['median']:.3g} s", ha="center", va="bottom", fontsize=7)
    names = [*(row.provider for row in steps), "left", *(row.provider for row in others)]
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7)
    case = group[0].case
    axes.set(ylabel="seconds a guided step", title=f"{case['model']}, {case['frames']} frames, {machine_words(group[0])}")
    axes.title.set_fontsize(8)
