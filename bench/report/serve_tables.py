"""Tables of the server under load."""

from collections.abc import Sequence

from vstar_engine.bench.harness.rows import OK, ResultRow, seconds

from .table_cells import across, cell, grouped, machine_words, markdown, titled


def serve(rows: Sequence[ResultRow], spread: bool) -> list[str]:
    """Returns the server under load, and what it adds to the bare engine."""
    chosen = [row for row in rows if row.suite == "serve"]
    found = []
    for group in grouped(chosen, lambda row: (row.case["model"], row.dtype, machine_words(row))):
        loads = [_load(row, spread) for row in group if row.case["part"] != "overhead"]
        head = ["arrivals", "jobs", "latency p50", "p95", "p99", "POST p99", "videos a second", "within", "refused"]
        if loads:
            found.append(f"{titled(group, 'The server under load')}\n\n{across(head, loads)}")
        alone = [_overhead(row, spread) for row in group if row.case["part"] == "overhead"]
        head = ["one video", "served", "bare engine", "overhead", "of it outside the stages"]
        if alone:
            found.append(f"{titled(group, 'One video, served and by the bare engine in turn')}\n\n{markdown(head, alone)}")
    return found


def _load(row: ResultRow, spread: bool) -> list[str]:
    case, numbers = row.case, row.numbers
    arriving = f"{case['part']}, {case['rate']:g} a second" if "rate" in case else case["part"]
    label = f"{arriving}; {case['frames']} frames, {case['steps']} steps"
    if row.status != OK:
        return [label, str(case.get("jobs", "")), f"{row.status}, {row.note}", *[""] * 6]
    times = [seconds(numbers[name]) for name in ("p95", "p99", "post_p99")]
    within = f"{numbers['attained']:.0%} in {seconds(numbers['slo'])}"
    return [
        label,
        str(case["jobs"]),
        cell(row, row, spread),
        *times,
        f"{numbers['throughput']:.3g}",
        within,
        str(numbers["refused"]),
    ]


def _overhead(row: ResultRow, spread: bool) -> list[str]:
    case, numbers = row.case, row.numbers
    label = f"{case['frames']} frames, {case['steps']} steps, {case['size']}"
    if row.status != OK:
        return [label, f"{row.status}, {row.note}", "", "", ""]
    own = f"{numbers['overhead'] * 1e3:.1f} ms"
    return [label, cell(row, row, spread), seconds(numbers["bare"]), own, f"{numbers['outside_stages'] * 1e3:.1f} ms"]
