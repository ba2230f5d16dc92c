"""A map of one UNet forward: FLOPs and bytes of every op, its floor on a machine, and which limit it meets there.

Nothing is computed: the network runs on tensors without data, in channels-last memory, both guidance branches in one call;
in float32 as on a CPU, else as on a GPU. An op's floor is the longer of its FLOPs at the matrix rate and its bytes, each tensor
read or written once, at the bandwidth. Below the map stands what fusing saves. `--measure` runs the forward here instead and
puts the time of each op beside the floor that this machine sets it.
"""

import argparse
from collections.abc import Callable

import torch

from vstar_engine.bench.harness.contest import Pace
from vstar_engine.bench.harness.random_networks import GUIDANCE_BRANCHES
from vstar_engine.bench.report import tables
from vstar_engine.bench.roofline import floors, fused_costs
from vstar_engine.bench.roofline.op_costs import KEYS, Machine, Op, ops_of
from vstar_engine.bench.step.workload import Workload, spec_named
from vstar_engine.config.models import parse_size
from vstar_engine.config.sampling import Sampling
from vstar_engine.machine.device import DTYPES, device_named, dtype_named

from .options import add_common, open_rows

FRAMES = (16, 64, 128)
TERA = 1e12


def table(ops: list[Op], machine: Machine, key: Callable[[Op], str]) -> list[list[str]]:
    """Returns a line per group, longest first: ops, TFLOP, GB, milliseconds of arithmetic and traffic, floor, share, limit."""
    groups: dict[str, list[Op]] = {}
    for op in ops:
        groups.setdefault(key(op), []).append(op)
    whole = sum(op.floor(machine) for op in ops)
    lines = []
    for name, found in sorted(groups.items(), key=lambda item: -sum(op.floor(machine) for op in item[1])):
        arithmetic, traffic = (sum(op.seconds(machine)[i] for op in found) for i in (0, 1))
        floor = sum(op.floor(machine) for op in found)
        bound = sum(op.floor(machine) for op in found if op.seconds(machine)[0] >= op.seconds(machine)[1]) / floor
        limit = "arithmetic" if bound > 0.9 else "memory" if bound < 0.1 else f"arithmetic {bound:.0%}"
        work = f"{sum(op.flops for op in found) / TERA:.2f}", f"{sum(op.bytes for op in found) / 1e9:.2f}"
        times = (f"{1e3 * x:.2f}" for x in (arithmetic, traffic, floor))
        lines.append([name, str(len(found)), *work, *times, f"{floor / whole:.1%}", limit])
    return lines


HEAD = ["", "ops", "TFLOP", "GB", "ms, arithmetic", "ms, memory", "ms, floor", "share", "limit"]


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


def report(ops: list[Op], machine: Machine, by: str, steps: int) -> str:
    """Returns the map in Markdown and two sums: op by op, and with all that is no product merged into its neighbours."""
    floor = sum(op.floor(machine) for op in ops)
    products = sum(op.floor(machine) for op in ops if op.flops)
    arithmetic = sum(op.flops for op in ops) / machine.flops
    words = (
        f"Floor of one forward {1e3 * floor:.1f} ms op by op; {1e3 * products:.1f} ms with norms, elementwise ops and copies "
        f"merged into the products; {1e3 * arithmetic:.1f} ms for the arithmetic alone. "
        f"{steps} steps: {steps * floor:.2f}, {steps * products:.2f} and {steps * arithmetic:.2f} s."
    )
    return f"{markdown(HEAD, table(ops, machine, KEYS[by]))}\n\n{words}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    add_common(parser, rounds=5, limit=60.0)
    parser.add_argument("--model", default="videocrafter2")
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES)
    parser.add_argument("--size", type=parse_size, metavar="HEIGHTxWIDTH", help="default the model's own")
    parser.add_argument(
        "--batch", type=int, default=GUIDANCE_BRANCHES, choices=(1, 2), help="guidance branches, default %(default)s"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default float16; to measure on a CPU float32")
    parser.add_argument("--tflops", type=float, default=790.0, help="matrix rate, TFLOP/s; default %(default)s, a busy H200")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="memory, TB/s; default %(default)s, an H200's")
    parser.add_argument("--by", choices=tuple(KEYS), default="kind")
    parser.add_argument("--measure", action="store_true", help="time every op here, beside the floor that this machine sets it")
    parser.add_argument("--device", help="to measure on; default cuda where there is one, else cpu")


def run(args: argparse.Namespace) -> int:
    """Prints a map for each number of frames, computed or measured; 1 if the network was wrong or failed."""
    if args.rehearse:
        args.model, args.size, args.frames, args.rounds, args.device, args.dtype = "tiny", None, [3], 1, "cpu", "float32"
    if args.measure and args.batch != GUIDANCE_BRANCHES:
        raise ValueError(f"--measure runs both guidance branches, got --batch {args.batch}; leave it out")
    there = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype_named(args.dtype or ("float32" if args.measure and there == "cpu" else "float16"))
    spec = spec_named(args.model)
    size = args.size or spec.size
    spec.check_size(*size)
    pace = Pace.within(args.budget, rounds=args.rounds, limit=args.limit)
    with open_rows(args) as rows:
        for frames in args.frames:
            if args.measure:
                workload = Workload(args.model, frames, size, dtype, device_named(there, dtype))
                found = floors.measure(workload, rows, pace)
            else:
                machine = Machine(args.tflops * TERA, args.bandwidth * TERA)
                print(f"**{args.model}, {frames} frames of {size[0]}x{size[1]}, batch {args.batch}, {str(dtype)[6:]}**\n")
                ops = ops_of(spec, frames, size, dtype, args.batch)
                print(report(ops, machine, args.by, Sampling.steps) + "\n", flush=True)
                found = fused_costs.count(spec, frames, size, dtype, machine, rows)
            print("\n" + "\n\n".join([*tables.roofline(found, False), *tables.fusion(found, False)]) + "\n", flush=True)
    return 1 if rows.failures else 0
