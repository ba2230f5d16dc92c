"""The table of whole videos: the published path, clean PyTorch, the engine, and the engine with a lossy option."""

from collections.abc import Sequence

from vstar_engine.bench.harness.rows import ResultRow, seconds
from vstar_engine.bench.step.whole_videos import OURS, PATHS, PUBLISHED

from .table_cells import cell, grouped, markdown, part_of, titled

WORDS = {PUBLISHED: "published path"}


def videos(rows: Sequence[ResultRow], spread: bool) -> list[str]:
    """Returns a row for each path to a video: its step, the whole of it, its memory, and whether it is the same video."""
    found = []
    for group in (same for some in part_of(rows, "videos") for same in grouped(some, lambda row: row.case["frames"])):
        table, case = {row.provider: row for row in group if row.numbers}, group[0].case
        body = []
        for name in (name for name in PATHS if name in table):
            row, first = table[name], table.get(PUBLISHED)
            faster = ""
            if first and row is not first:
                faster = f" ({first.numbers['median'] / row.numbers['median']:.2f}x as fast)"
            said = f"**{cell(row, spread=spread)}**" if name == OURS else cell(row, spread=spread)
            memory = f"{row.numbers['peak_bytes'] / 2**20:.0f} MiB"
            body.append([WORDS.get(name, name), seconds(row.numbers["step"]), said + faster, memory, _same(row)])
        if body:
            load = next(iter(table.values())).numbers["load"]
            words = f"{case['frames']} frames, {case['steps']} guided steps and all else, prompt to mp4"
            remark = f", load average {load[0]:g} to {load[1]:g}"
            head = ["", "a step", "whole video", "memory beside the weights", "same output?"]
            found.append(f"{titled(group, words, remark)}\n\n{markdown(head, body)}")
    return found


def _same(row: ResultRow) -> str:
    """Says whether a video is the published path's: its bytes may differ by one step of 255, which is rounding."""
    if row.provider == PUBLISHED:
        return "is the reference"
    numbers = row.numbers
    if numbers["largest"] <= 1:
        return f"yes: {100 * numbers['differing']:.2g} % of bytes off by 1" if numbers["differing"] else "yes, to the byte"
    return f"no: PSNR {numbers['psnr']:.1f} dB"
