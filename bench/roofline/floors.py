"""Every op of one forward timed on this machine, beside the floor that the bandwidth and matrix rate reached here set it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.module_tracker import ModuleTracker

from vstar_engine.bench.harness.ceilings import BANDWIDTH, MATRIX, ceilings, per_second, reached
from vstar_engine.bench.harness.contest import Contest, Pace, Provider, hold
from vstar_engine.bench.harness.random_networks import relative_error
from vstar_engine.bench.harness.rows import ResultFile, ResultRow
from vstar_engine.bench.harness.timing import Mark, mark, seconds_between, summarise
from vstar_engine.bench.ops.attention_providers import check_ours
from vstar_engine.bench.step.workload import ERROR_BUDGET, Workload
from vstar_engine.machine import malloc
from vstar_engine.networks.unet import UNet

from .op_costs import KEYS, Machine, Op, Recorder

SUITE = "roofline"
FORWARD, BY_OPS, WHOLE = "forward", "op by op", "whole forward"
# what rows are summed by
PARTS = ("kind", "block")


class TimedRecorder(Recorder):
    """Also notes when each operator began and ended; a launch counts where it takes longer than its operator."""

    def __init__(self, tracker: ModuleTracker) -> None:
        super().__init__(tracker)
        self.spans: list[tuple[Mark, Mark]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = mark()
        out = func(*args, **(kwargs or {}))
        end = mark()
        if self.note(func, args, kwargs, out):
            self.spans.append((start, end))
        return out


class ByOps:
    """A forward with every op timed; its runs stay."""

    def __init__(self, unet: UNet, inputs: Sequence[Tensor]):
        self.unet, self.inputs = unet, inputs
        self.runs: list[TimedRecorder] = []

    def __call__(self) -> Tensor:
        tracker = ModuleTracker()
        with tracker, TimedRecorder(tracker) as recorder:
            out = self.unet(*self.inputs)
        self.runs.append(recorder)
        return out

    def seconds(self, rounds: int) -> list[list[float]]:
        """Returns the seconds of each op in each of the last rounds."""
        return [[seconds_between(*span) for span in run.spans] for run in self.runs[-rounds:]]


def contest(workload: Workload, by_ops: ByOps) -> Contest:
    """Returns the forward as it runs, and op by op, both held to the definition in a wider dtype."""

    def forward() -> Callable[[], Tensor]:
        check_ours(workload.device)
        return lambda: by_ops.unet(*by_ops.inputs)

    return Contest(
        *(SUITE, {"part": FORWARD, **workload.case}, workload.dtype, workload.device),
        [Provider(FORWARD, forward), Provider(BY_OPS, lambda: by_ops, traced=False)],
        lambda _, answer: relative_error(answer, workload.wanted),
        ERROR_BUDGET[workload.dtype],
        ceilings=ceilings(workload.device, workload.dtype),
    )


def sums(ops: Sequence[Op], seconds: Sequence[Sequence[float]], machine: Machine, key: Callable[[Op], str]) -> dict[str, dict]:
    """Returns the numbers of each group of ops: work, floor, median time, and shares of the time and of the floor."""
    groups: dict[str, list[int]] = {}
    for i, op in enumerate(ops):
        groups.setdefault(key(op), []).append(i)
    whole = summarise([sum(taken) for taken in seconds]).median
    found = {}
    for name, places in groups.items():
        timing = summarise([sum(taken[i] for i in places) for taken in seconds])
        found[name] = {
            **work([ops[i] for i in places], machine, timing.median),
            **asdict(timing),
            "share": timing.median / whole,
        }
    return found


def work(ops: Sequence[Op], machine: Machine, seconds: float) -> dict[str, float]:
    """Adds up what some ops do and the least they take, and says how near that the seconds given come."""
    floor = sum(op.floor(machine) for op in ops)
    flops, moved = (sum(getattr(op, name) for op in ops) for name in ("flops", "bytes"))
    return {"ops": len(ops), "flops": flops, "bytes": moved, "floor": floor, "share_of_floor": floor / seconds}


@torch.no_grad()
def measure(workload: Workload, rows: ResultFile, pace: Pace) -> list[ResultRow]:
    """Times one workload's forward; writes a row for each kind of op, each block and the whole, and returns them."""
    if workload.device.type == "cpu":
        malloc.keep_pages()
    by_ops = ByOps(workload.unet(workload.dtype, "channels_last"), workload.inputs)
    held = contest(workload, by_ops)
    timings = hold(held, rows, pace)
    if not {FORWARD, BY_OPS} <= timings.keys():
        return []
    most = {name: best.per_second for name, best in reached(held.ceilings, timings).items()}
    machine = Machine(most[MATRIX], most[BANDWIDTH])
    ops, seconds = by_ops.runs[-1].ops, by_ops.seconds(timings[BY_OPS].rounds)

    def row(part: str, name: str, numbers: dict[str, Any]) -> ResultRow:
        found = replace(held.row(name), case={"part": part, **workload.case}, numbers=numbers, ceilings=per_second(most))
        return rows.write(found)

    written = [row(part, name, found) for part in PARTS for name, found in sums(ops, seconds, machine, KEYS[part]).items()]
    whole = {**work(ops, machine, timings[FORWARD].median), **asdict(timings[FORWARD])}
    return [*written, row("whole", WHOLE, whole)]
