"""Compiles every launch-table entry of the Triton kernels to PTX and cubin without a GPU, and refuses what would run badly.

    python -m vstar_engine.kernels.aot --arch 80,86,89,90,100,120 --out DIR [--head-dim 64] [--dtype fp16]
    python -m vstar_engine.kernels.aot --report DIR > docs/performance/compiled_kernels.md

DIR receives a .ptx, a .cubin and a .json record for each entry and one manifest.json over all. A record is reused while its
key (kernel source, Triton version, entry) and its files' sha256 stand. The exit status is 1, with one sentence for each
fault on stderr, when an entry spills, outgrows its architecture's shared memory, loads or stores a tile through less than 128
bits at a time, lacks the tensor-core instruction it claims, wants hidden scratch memory, or has no artifact.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import triton

from vstar_engine.kernels.gpu.temporal_attention_launch import ARCHITECTURES, DTYPES, HEAD_DIMS

from .attention_entries import entries
from .compilation import Compilable, compile_all
from .frame_entries import frame_entries
from .fused_entries import fused_entries
from .report import page
from .selection import check, numbers, words


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = argparse.ArgumentParser(prog="python -m vstar_engine.kernels.aot", description=(__doc__ or "").split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder to compile into")
    what.add_argument("--report", type=Path, metavar="DIR", help="print the page about the kernels compiled into a folder")
    parser.add_argument("--arch", type=numbers, default=list(ARCHITECTURES), help="compute capabilities, such as 80,90")
    parser.add_argument("--head-dim", type=numbers, default=list(HEAD_DIMS))
    parser.add_argument("--dtype", type=words, default=list(DTYPES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = build_parser()
    chosen = parser.parse_args(arguments)
    try:
        return report(chosen.report) if chosen.report else compile_chosen(chosen)
    except ValueError as error:
        parser.error(str(error))


def report(folder: Path) -> int:
    """Prints the page about a folder of compiled kernels."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{path} is not there: make it with `python -m vstar_engine.kernels.aot --out {folder}`")
    sys.stdout.write(page(json.loads(path.read_text())))
    return 0


def compile_chosen(chosen: argparse.Namespace) -> int:
    """Compiles the entries that the options select; 1 where one has a fault."""
    check(chosen.arch, chosen.dtype)
    if not all(1 <= head_dim <= max(HEAD_DIMS) for head_dim in chosen.head_dim):
        raise ValueError(f"head widths lie between 1 and {max(HEAD_DIMS)}, got {chosen.head_dim}")
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    wanted: list[Compilable] = [
        *entries(chosen.arch, chosen.head_dim, chosen.dtype),
        *fused_entries(chosen.arch, chosen.dtype),
        *frame_entries(chosen.arch, chosen.dtype),
    ]
    manifest = compile_all(wanted, chosen.out, chosen.jobs)
    faults = manifest["faults"]
    sys.stdout.write(f"{len(manifest['entries'])} of {len(wanted)} kernels in {chosen.out}, {len(faults)} faults\n")
    sys.stderr.writelines(f"{sentence}\n" for sentence in faults)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
