"""Where one step's time goes, by operator and by kind of block, as a Markdown page, rows and a Chrome trace."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from vstar_engine.bench.harness.block_costs import profile as profile_blocks
from vstar_engine.bench.harness.ceilings import MATRIX, measured, per_second
from vstar_engine.bench.harness.rows import ResultFile, ResultRow, share
from vstar_engine.bench.harness.rows import seconds as words

from .ladder import ENGINE, Step
from .workload import Workload

PAGE, TRACE = "profile.md", "trace.json.gz"
TOP = 20


def operators(call: Callable[[], object], device: torch.device, trace: Path) -> list[tuple[str, int, float]]:
    """Runs a call under PyTorch's profiler; returns the operators' names, counts and own seconds, the longest first."""
    gpu = device.type == "cuda"
    call()
    with profiler(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as seen:
        call()
    seen.export_chrome_trace(str(trace))
    events = seen.key_averages()
    table = [(e.key, e.count, (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1e6) for e in events]
    return sorted((row for row in table if row[2] > 0), key=lambda row: -row[2])


def block_rows(workload: Workload, step: Step, rounds: int, peak: float) -> dict[str, dict[str, float]]:
    """Returns seconds, share of the step, floor by FLOPs, and share of the matrix ceiling, `peak`, for each kind of block."""
    unet = step.network(ENGINE)
    inputs = workload.inputs_as(workload.dtype)
    seconds = profile_blocks(unet, lambda: unet(*inputs), rounds)
    return {
        kind: {
            "seconds": taken,
            "share": taken / seconds["whole"],
            "share_of_matrix": workload.flops[kind] / taken / peak if taken > 0 else 0.0,
            "tflop": workload.flops[kind] / 1e12,
            "floor": workload.flops[kind] / peak,
        }
        for kind, taken in seconds.items()
    }


def page(
    workload: Workload, blocks: Mapping[str, Mapping[str, float]], table: list[tuple[str, int, float]], rows: ResultFile
) -> str:
    """Writes the profile as Markdown."""
    here = rows.machine
    lines = [
        f"# Where a step's time goes: {', '.join(f'{name} {value}' for name, value in workload.case.items())}",
        "",
        f"{here['gpu'] or here['cpu']}, {str(workload.dtype)[6:]}, torch {here['torch']}, commit {str(here['commit'])[:12]}.",
        f"Both guidance branches run in one batch. `{rows.command}`",
        "",
        "| block | time | share | TFLOP | floor by FLOPs | share of the matrix ceiling |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for kind, found in sorted(blocks.items(), key=lambda item: -item[1]["seconds"]):
        shares = f"{found['share']:.1%} | {found['tflop']:.3g} | {words(found['floor'])} | {share(found['share_of_matrix'])}"
        lines.append(f"| {kind} | {words(found['seconds'])} | {shares} |")
    whole = sum(taken for *_, taken in table)
    lines += ["", "| operator | calls | own time | share |", "|---|--:|--:|--:|"]
    lines += [f"| `{name}` | {count} | {words(taken)} | {taken / whole:.1%} |" for name, count, taken in table[:TOP]]
    return "\n".join(lines) + "\n"


@torch.no_grad()
def measure(workload: Workload, step: Step, rounds: int, folder: Path, rows: ResultFile) -> None:
    """Profiles one step of the engine into `folder` and writes its blocks as rows."""
    folder.mkdir(parents=True, exist_ok=True)
    call: Callable[[], Tensor] = step.call(ENGINE)
    table = operators(call, workload.device, folder / TRACE)
    most = measured(workload.device, workload.dtype, rounds)
    blocks = block_rows(workload, step, rounds, most[MATRIX])
    case = {"part": "profile", **workload.case}
    for kind, found in blocks.items():
        where = str(workload.dtype)[6:], str(workload.device)
        rows.write(ResultRow("pipeline", case, kind, *where, numbers=found, ceilings=per_second(most)))
    (folder / PAGE).write_text(page(workload, blocks, table, rows))
    print(f"wrote {folder / PAGE} and {folder / TRACE}")
