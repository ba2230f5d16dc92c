"""The page about compiled kernels, docs/performance/compiled_kernels.md, from the manifest of their folder."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from vstar_engine.kernels.gpu.temporal_attention_launch import DTYPES, Config, padded

Record = dict[str, Any]


class Multiprocessor(NamedTuple):
    """What an architecture's multiprocessor holds at once: KiB of shared memory, warps, programs."""

    shared: int
    warps: int
    programs: int


# from the table of compute capabilities in NVIDIA's CUDA programming guide
MULTIPROCESSORS = {
    80: Multiprocessor(164, 64, 32),
    86: Multiprocessor(100, 48, 16),
    89: Multiprocessor(100, 48, 24),
    90: Multiprocessor(228, 64, 32),
    100: Multiprocessor(228, 64, 32),
    120: Multiprocessor(100, 48, 24),
}
REGISTERS, REGISTERS_AT_ONCE = 65536, 256  # of a multiprocessor, and how many a warp gets at a time
RESERVED = 1024  # bytes of shared memory that each program takes besides its own
INTRODUCTION = """# The Triton kernels as compiled

**You want to know what the compiler made of each kernel.**

`python -m vstar_engine.kernels.aot --head-dim {widths} --dtype {dtype} --out DIR` compiled {count} kernels with
Triton {triton} and without a GPU; `python -m vstar_engine.kernels.aot --report DIR` wrote this page. Faults: {faults}.
A fault is a spill, stack, scratch memory, too much shared memory, a tile moved by less than 128 bits at a time, or a missing
tensor-core instruction. **No speed was measured.**
"""
ATTENTION = """## Temporal attention

{count} kernels: even ones have no masks, ragged ones have, dense ones take a matrix for a bias. Registers and shared memory
come from the compiled code. Programs per multiprocessor and the bytes that their tile loads (q, k, v; of a sweep k, v) have
in flight at once are computed from those and from each architecture's limits, for the even kernel and one stage.
"""
FUSED = """## The fused ops

{count} kernels, for the widths of VideoCrafter2, and frame attention for heads of 128. Registers are by architecture, in the
order in which these are named. What sweeps a tensor loads and stores 128 bits at a time; `groupnorm_silu_settle` and
`linear_moments` make statistics, a few to a channel or a row.
"""


def programs(record: Record) -> int:
    """Computes how many programs a multiprocessor holds at once."""
    here, warps = MULTIPROCESSORS[record["arch"]], record["warps"]
    registers = -(-32 * record["registers"] // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE * warps
    shared = here.shared * 1024 // (record["shared"] + RESERVED)
    return min(REGISTERS // registers, shared, here.warps // warps, here.programs)


def table(head: Sequence[str], words: Sequence[int], body: Iterable[Sequence[object]]) -> str:
    """Returns a Markdown table; `words` are the columns that hold text, aligned left."""
    rule = "|".join("---" if i in words else "--:" for i in range(len(head)))
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in body]
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *lines]) + "\n"


def grouped(records: Iterable[Record], *names: str) -> list[list[Record]]:
    """Groups records by the values of some names."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(json.dumps([record[name] for name in names]), []).append(record)
    return list(found.values())


def attention(records: Sequence[Record]) -> str:
    """Returns the table of temporal attention: a row for each architecture and row of the launch table."""
    body = []
    for group in grouped(records, "arch", "head_dim", "config"):
        row, first = Config(**group[0]["config"]), group[0]
        row_bytes = padded(first["head_dim"]) * DTYPES[first["dtype"]].bytes
        tiles = (2 * row.keys if row.sweep else row.rows + 2 * row.keys) * row_bytes
        held = programs(first)
        body.append(
            (
                f"sm_{first['arch']}, {'sweep' if row.sweep else 'tile'} {row.rows}x{row.keys}",
                f"{row.warps}, {row.stages}",
                " / ".join(str(record["registers"]) for record in group),
                _kib(first["shared"]),
                f"{held} ({_kib(held * tiles)})",
                ", ".join(first["tensor_core"]),
            )
        )
    kinds = "registers, even / ragged / dense"
    head = ("", "warps, stages", kinds, "shared, KiB", "programs (KiB in flight)", "tensor cores")
    return table(head, (0, 1, 2, 4, 5), body)


def fused(records: Sequence[Record]) -> str:
    """Returns the table of the fused ops: a row for each kernel, more where architectures differ in more than registers."""
    accesses = ("loads_128", "loads_32", "loads_other", "stores_128", "stores_32", "stores_other", "tensor_core", "spills")
    body = []
    # ops, then architectures of one kernel beside each other
    ordered = [record for op in grouped(records, "op") for kernel in grouped(op, "case") for record in kernel]
    for group in grouped(ordered, "op", "case", "warps", "shared", *accesses):
        first = group[0]
        body.append(
            (
                f"`{first['op']}` {first['case'].replace('_', ' ')}",
                ", ".join(str(record["arch"]) for record in group),
                f"{first['warps']}, {_kib(first['shared'])}",
                " / ".join(str(record["registers"]) for record in group)
                + (f", {first['spills']} spills" if first["spills"] else ""),
                f"{_accesses(first, 'loads')}; {_accesses(first, 'stores')}",
                ", ".join(first["tensor_core"]),
            )
        )
    head = ("kernel", "sm", "warps, shared KiB", "registers", "loads of 128 / 32 bits; stores", "tensor cores")
    return table(head, range(6), body)


def _spills(record: Record) -> str:
    return f", {record['spills']} spills" if record["spills"] else ""


def _kib(count: int) -> str:
    return f"{count / 1024:.3g}"


def _accesses(record: Record, kind: str) -> str:
    """Counts accesses of 128 and of 32 bits, and names the others by their width."""
    others = sorted({name.rpartition(".")[2].strip("SU") for name in record[f"{kind}_other"]}, key=int)
    also = f", and of {', '.join(others)}" if others else ""
    return f"{record[f'{kind}_128']} / {record[f'{kind}_32']}{also}"


def page(manifest: Record) -> str:
    """Returns the whole page. Raises ValueError for a manifest of several dtypes."""
    records = manifest["entries"]
    dtypes = sorted({record["dtype"] for record in records})
    if len(dtypes) != 1:
        raise ValueError(
            f"the page is for one dtype, and the manifest has {', '.join(dtypes) or 'none'}: compile with --dtype fp16"
        )
    products = [record for record in records if "op" not in record]
    others = [record for record in records if "op" in record]
    introduction = INTRODUCTION.format(
        widths=",".join(map(str, sorted({record["head_dim"] for record in products}))),
        dtype=dtypes[0],
        count=len(records),
        triton=manifest["triton"],
        faults="; ".join(manifest["faults"]) or "none",
    )
    tables = (ATTENTION.format(count=len(products)), attention(products), FUSED.format(count=len(others)), fused(others))
    return "\n".join([introduction, *tables])
