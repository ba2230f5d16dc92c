"""Rows as Markdown tables: one a question, each with the conditions it was measured under."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vstar_engine.bench.harness.ceilings import BANDWIDTH, MATRIX
from vstar_engine.bench.harness.rows import OK, ResultRow, seconds, share
from vstar_engine.bench.ops.attention_providers import OURS, PROVIDERS
from vstar_engine.bench.ops.op_providers import CONVOLUTION, NAMES
from vstar_engine.bench.step.ladder import BUILT, ENGINE, IMPROVEMENTS

from .busy_tables import busy
from .fast_tables import fast, strays
from .growth_tables import growth
from .serve_tables import serve
from .table_cells import across, cell, conditions, folded, grouped, machine_words, markdown, part_of, titled
from .video_tables import videos

CEILINGS = (BANDWIDTH, MATRIX)
HEADLINE = ("ours", "ours compiled", "ours, AOTInductor", "ours, CUDA graph", "clean eager", "clean compiled", "published")
PUBLISHED = "published"
STAGES = ("text", "UNet step", "sampler", "VAE", "mp4")
ADDED = ("published, with preview", "published", *(f"+ {name}" for name in IMPROVEMENTS if name not in BUILT))
RUNGS = (*ADDED, *(f"or {name}" for name in IMPROVEMENTS if name in BUILT))
ABLATED = ("all", *(f"all but {name}" for name in IMPROVEMENTS))


# from which the engine's step in two contests of one run is worth a word
DRIFT = 1.1


def newest(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """Keeps the latest row of each provider, case and machine, in the order in which each was first measured."""
    found: dict[tuple[object, ...], ResultRow] = {}
    for row in sorted(rows, key=lambda row: row.at):
        found[row.key, row.machine.get("gpu") or row.machine.get("cpu"), row.machine.get("threads")] = row
    return list(found.values())


def _frames(row: ResultRow) -> str:
    return str(row.case["frames"])


def _level_and_frames(row: ResultRow) -> str:
    return f"{row.case['frames']} at level {row.case['level']}"


def by_provider(
    rows: Sequence[ResultRow],
    names: Iterable[str],
    spread: bool,
    label: Callable[[ResultRow], str] = _frames,
    head: str = "frames",
) -> str:
    """Lays out providers down and cases across, each against ours."""
    known = {row.provider for row in rows}
    columns = [name for name in names if name in known]
    body = []
    for group in grouped(rows, label):
        found = {row.provider: row for row in group}
        own = found.get(OURS)
        shares = [_share(own, "share_of_bandwidth"), _share(own, "share_of_matrix"), _memory(own)]
        cells = [cell(found.get(name), own, spread) for name in columns]
        body.append([label(group[0]), *cells, _floor(own), *shares])
    extra = ("floor", "ours: of bandwidth", "of matrix peak", "peak memory")
    used = [i for i, _ in enumerate(extra) if any(cells[len(columns) + 1 + i] for cells in body)]
    kept = [[*cells[: len(columns) + 1], *(cells[len(columns) + 1 + i] for i in used)] for cells in body]
    return across([head, *columns, *(extra[i] for i in used)], kept)


def by_use(rows: Sequence[ResultRow], spread: bool) -> str:
    """Lays out an op's uses down and providers across, each against ours."""
    known = {row.provider for row in rows}
    names = [name for name in NAMES if name in known]
    body = []
    for group in grouped(rows, _use):
        found = {row.provider: row for row in group}
        own = found.get(OURS)
        shares = " / ".join(_share(own, name) or "-" for name in ("share_of_bandwidth", "share_of_matrix"))
        cells = [cell(found.get(name), own, spread) for name in names]
        body.append([_use(group[0]), *cells, _floor(own), shares, _memory(own)])
    return markdown(["", *names, "floor", "ours: of bandwidth / matrix peak", "peak memory"], body)


def _share(row: ResultRow | None, name: str) -> str:
    value = None if row is None else row.numbers.get(name)
    return "" if value is None else share(value)


def _floor(row: ResultRow | None) -> str:
    value = None if row is None else row.numbers.get("floor")
    return "" if value is None else seconds(value)


def _memory(row: ResultRow | None) -> str:
    value = None if row is None else row.numbers.get("peak_bytes")
    return "" if value is None else f"{value / 2**20:.0f} MiB"


def kernels(rows: Sequence[ResultRow], spread: bool) -> list[str]:
    """Returns a table for each op, level, layout, batch, dtype and machine: frames down, providers across."""
    found = []

    def same(row: ResultRow) -> Any:
        case = row.case
        level = case["level"] if "layout" in case else None
        return case["op"], level, case.get("layout"), case["batch"], row.dtype, machine_words(row)

    for group in grouped([row for row in rows if row.suite == "kernels" and "form" not in row.case], same):
        case = group[0].case
        title = f"`{case['op']}`, batch {case['batch']}"
        if "layout" in case:
            positions, heads, width = case["shape"].split("x")[2:]
            title += f", level {case['level']} ({positions} positions, {heads} heads of {width}), {case['layout']} layout"
        names = [*PROVIDERS, *dict.fromkeys(row.provider for row in group if row.provider not in (*PROVIDERS, *CEILINGS))]
        group.sort(key=lambda row: (str(row.case["level"]), row.case["frames"]))
        label = _frames if "layout" in case else _level_and_frames
        found.append(f"{title}; {conditions(group)}\n\n{by_provider(group, names, spread, label)}")
    return found


def memory(rows: Sequence[ResultRow], spread: bool) -> list[str]:
    """Returns what temporal attention allocates at its peak, computed: frames down, providers across."""
    found = []

    def same(row: ResultRow) -> Any:
        return row.case["level"], row.case["layout"], row.case["batch"], row.dtype

    for group in grouped([row for row in rows if row.suite == "memory" and row.status == OK], same):
        case, (first, *_) = group[0].case, group
        names = dict.fromkeys(row.provider for row in group)
        title = f"Peak MiB of `{case['op']}`, computed, not measured, batch {case['batch']}, level {case['level']}, "
        title += f"{case['layout']} layout, {first.dtype}\n\n{folded(group)}"
        body = []
        for length in grouped(sorted(group, key=lambda row: row.case["frames"]), _frames):
            table = {row.provider: f"{row.numbers['peak_bytes'] / 2**20:.0f}" for row in length}
            body.append([_frames(length[0]), *(table.get(name, "") for name in names)])
        found.append(f"{title}\n\n{across(['frames', *names], body)}")
    return found


def fused(rows: Sequence[ResultRow], spread: bool) -> list[str]:
    """Returns the other ops and the temporal convolution: uses down, providers across."""
    found = []
    chosen = [row for row in rows if row.suite == "kernels" and "form" in row.case]
    for group in grouped(chosen, lambda row: (row.case["op"] == CONVOLUTION, row.case["batch"], row.dtype, machine_words(row))):
        group.sort(key=lambda row: (row.case["op"], row.case["form"], row.case["level"], row.case["frames"]))
        found.append(f"Batch {group[0].case['batch']}; {conditions(group)}\n\n{by_use(group, spread)}")
    return found


def _use(row: ResultRow) -> str:
    case = row.case
    return f"`{case['op']}`, {case['form']}, level {case['level']}, {case['frames']} frames"


def headline(rows: Sequence[ResultRow], spread: bool) -> list[str]:
    """Returns the engine's guided step against clean baselines; a compiled one's search stands behind its name."""
    found = []
    for group in part_of(rows, "headline"):
        known = {row.provider: _kind(row.provider) for row in group if _kind(row.provider) in HEADLINE}
        names = sorted(known, key=lambda name: HEADLINE.index(known[name]))
        table = by_provider(sorted(group, key=lambda row: row.case["frames"]), names, spread)
        found.append(f"{titled(group, 'One guided step (both branches)', drift(group, rows))}\n\n{table}")
    return found


def drift(group: Sequence[ResultRow], rows: Sequence[ResultRow]) -> str:
    """Says how far the engine's step, one and the same, lies apart in the contests of a table's runs, where that is far."""
    asked = {(row.run, row.case["frames"]) for row in group}
    engine = [row for row in rows if row.numbers.get("features") == sorted(ENGINE) and "median" in row.numbers]
    said = []
    for same in grouped(engine, lambda row: (row.run, row.case["frames"])):
        times = [row.numbers["median"] for row in same]
        if (same[0].run, same[0].case["frames"]) in asked and max(times) > DRIFT * min(times):
            said.append(f"{seconds(min(times))} to {seconds(max(times))} at {same[0].case['frames']} frames")
    return f". The engine's step took {', '.join(said)} in the contests of this run: compare within one" if said else ""


def _kind(provider: str) -> str:
    return provider if provider in HEADLINE else provider.rpartition(", ")[0]


def stages(rows: Sequence[ResultRow], spread: bool) -> list[str]:
    """Returns the seconds of a whole video by stage, the engine's and the published path's, and the floors of the engine's."""
    found = []
    wholes = {
        (*_workload(row), row.dtype, row.provider): row
        for row in rows
        if row.suite == "pipeline" and row.case["part"] == "whole"
    }
    for group in part_of(rows, "stages"):
        tables = []
        for same in grouped(sorted(group, key=lambda row: row.case["frames"]), _frames):
            table = {row.provider: row for row in same}
            where = (*_workload(same[0]), same[0].dtype)
            whole, theirs = (wholes.get((*where, path)) for path in (OURS, PUBLISHED))
            body = [[name, cell(table.get(name), spread=spread), _by_path(table, name, spread)] for name in STAGES]
            body = [[*cells, _floor(table.get(cells[0]))] for cells in body]
            if whole:
                words = f"{whole.case['steps']} steps: {', '.join(whole.numbers['includes'])}"
                body.append([f"whole video, {words}", cell(whole, whole), cell(theirs, whole), ""])
            tables.append(markdown([f"{_frames(same[0])} frames", OURS, PUBLISHED, "floor"], body))
        found.append("\n\n".join([titled(group, "A video by stage", drift(group, rows)), *tables]))
    return found


def _by_path(table: Mapping[str, ResultRow], name: str, spread: bool) -> str:
    """Returns a stage as the published path takes it, by how many times the engine's; what both share is the engine's."""
    own, theirs = table.get(name), table.get(f"{name}, {PUBLISHED}")
    return cell(theirs, own, spread) if theirs else cell(own, spread=spread)


def _rungs(rows: Sequence[ResultRow], part: str, names: Sequence[str], base: str, title: str) -> list[str]:
    found = []
    for group in part_of(rows, part):
        lengths = sorted({row.case["frames"] for row in group})
        table = {(row.provider, row.case["frames"]): row for row in group}
        body = []
        for name in names:
            if not any((name, frames) in table for frames in lengths):
                continue
            cells = []
            for frames in lengths:
                row, first = table.get((name, frames)), table.get((base, frames))
                said = cell(row)
                if row and first and row is not first and row.status == first.status == OK:
                    ratio = first.numbers["median"] / row.numbers["median"]
                    said += f" ({1 / ratio if part == 'ablation' else ratio:.2f}x)"
                cells += [said, _memory(row)]
            compiler = next((row.numbers.get("compiler") for row in group if row.provider == name), None)
            body.append([f"{name}, {compiler}" if compiler else name, *cells])
        head = ["", *(words for frames in lengths for words in (f"{frames} frames", "memory"))]
        found.append(f"{titled(group, title, drift(group, rows))}\n\n{markdown(head, body)}")
    return found


def ladder(rows: Sequence[ResultRow], spread: bool) -> list[str]:
    """Returns the steps from the published behaviour to the engine's, an improvement a line."""
    words = "One guided step, an improvement more a line (how many times as fast as published)"
    return _rungs(rows, "ladder", RUNGS, "published", words)


def ablation(rows: Sequence[ResultRow], spread: bool) -> list[str]:
    """Returns all improvements but one."""
    return _rungs(rows, "ablation", ABLATED, "all", "One guided step without one improvement (its time by that of all)")


def trajectory(rows: Sequence[ResultRow], spread: bool) -> list[str]:
    """Returns how far the run's dtype strays, with the same noise."""
    found = []
    for group in part_of(rows, "trajectory"):
        body = []
        for row in sorted(group, key=lambda row: row.case["frames"]):
            label = f"{row.case['frames']} ({row.case['weights']} weights)" + (f", {row.note}" if row.note else "")
            if row.status != OK:
                body.append([label, row.status, row.note or "", "", "", ""])
                continue
            cosine, psnr = row.numbers["cosine"], row.numbers["psnr"]
            middle = len(cosine) // 2
            picked = [f"{cosine[0]:.6f}", f"{cosine[middle]:.6f}", f"{cosine[-1]:.6f}", f"{psnr[0]:.1f}", f"{psnr[-1]:.1f} dB"]
            body.append([label, *picked])
        head = ["frames", "cosine after the first step", "half-way", "last", "PSNR after the first step", "last"]
        against = group[0].numbers.get("against", "a wider dtype")
        found.append(f"{titled(group, f'Latents against {against} with the same noise')}\n\n{markdown(head, body)}")
    return found


def engine(rows: Sequence[ResultRow], spread: bool) -> list[str]:
    """Cold start, loading, building, sizes."""
    chosen = [row for row in rows if row.suite == "engine"]
    found = []
    for group in grouped(chosen, lambda row: (row.case["model"], row.case["frames"], row.dtype, machine_words(row))):
        body = [[f"{row.case['part']}: {row.provider}", _amounts(row, spread)] for row in group]
        title = f"`{group[0].case['model']}`, {group[0].case['frames']} frames; {conditions(group)}"
        found.append(f"{title}\n\n{markdown(['', ''], body)}")
    return found


def _amounts(row: ResultRow, spread: bool) -> str:
    if row.status != OK:
        return f"{row.status}, {row.note}"
    said = [cell(row, spread=spread)] if "median" in row.numbers else []
    sizes: Mapping[str, Any] = {name: value for name, value in row.numbers.items() if name.endswith("_bytes") and value}
    said += [f"{name.removesuffix('_bytes')} {value / 2**20:.0f} MiB" for name, value in sizes.items()]
    return ", ".join(said)


def roofline(rows: Sequence[ResultRow], spread: bool) -> list[str]:
    """Returns time beside its floor: by kind of op, by block, and the whole forward, which no clock interrupts."""
    found = []
    for part in ("kind", "block"):
        for group in (same for some in part_of(rows, part, "roofline") for same in grouped(some, _frames)):
            ranked = sorted(group, key=lambda row: -row.numbers["median"])
            wholes = [row for row in rows if row.case.get("part") == "whole" and row.suite == "roofline"]
            ranked += [row for row in wholes if (*_workload(row), row.dtype) == (*_workload(ranked[0]), ranked[0].dtype)]
            head = [part, "ops", "work", "floor", "time (of the ops' time)", "floor / time"]
            words = f"One guided step of {group[0].case['frames']} frames by {part}"
            found.append(f"{titled(group, words)}\n\n{markdown(head, [_beside_floor(row, spread) for row in ranked])}")
    return found


def _workload(row: ResultRow) -> tuple[Any, ...]:
    return row.case["model"], row.case["size"], row.case["frames"], machine_words(row)


def _beside_floor(row: ResultRow, spread: bool) -> list[str]:
    numbers = row.numbers
    part = f" ({numbers['share']:.1%})" if "share" in numbers else ""
    ops, flops, moved, floor = _work(row)
    return [
        row.provider,
        ops,
        f"{flops} TFLOP, {moved} GB",
        floor,
        cell(row, spread=spread) + part,
        share(numbers["share_of_floor"]),
    ]


def _work(row: ResultRow) -> list[str]:
    """Says how many operators a row sums up, their TFLOPs, their GB and their floor."""
    numbers = row.numbers
    amounts = (numbers["flops"] / 1e12, numbers["bytes"] / 1e9)
    said = (f"{x:.0f}" if x >= 100 else f"{x:.3g}" if x >= 0.01 else f"{x:.4f}" for x in amounts)
    return [str(numbers["ops"]), *said, seconds(numbers["floor"])]


def fusion(rows: Sequence[ResultRow], spread: bool) -> list[str]:
    """Returns what fusing saves, computed: operators, bytes, and the floor at the rates given."""
    found = []
    for group in (same for some in part_of(rows, "fusion", "roofline") for same in grouped(some, lambda row: row.command)):
        first = group[0]
        rates = f"{first.ceilings['flops_per_second'] / 1e12:g} TFLOP/s, {first.ceilings['bytes_per_second'] / 1e12:g} TB/s"
        workload = f"`{first.case['model']}` at {first.case['size']}, {first.dtype}"
        title = f"One guided step, computed, not measured, {workload}; floors at {rates}\n\n{folded(group)}"
        body = [
            [f"{row.case['frames']} frames, {row.provider}", *_work(row)]
            for row in sorted(group, key=lambda row: row.case["frames"])
        ]
        found.append(f"{title}\n\n{markdown(['', 'operators', 'TFLOP', 'GB', 'floor, op by op'], body)}")
    return found


TABLES: dict[str, Callable[[Sequence[ResultRow], bool], list[str]]] = {
    "videos": videos,
    "kernels": kernels,
    "memory": memory,
    "growth": growth,
    "fused": fused,
    "headline": headline,
    "stages": stages,
    "ladder": ladder,
    "ablation": ablation,
    "trajectory": trajectory,
    "fast": fast,
    "strays": strays,
    "roofline": roofline,
    "fusion": fusion,
    "engine": engine,
    "serve": serve,
    "busy": busy,
}
