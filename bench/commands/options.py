"""The flags that every measurement takes."""

import argparse
import math
from pathlib import Path

import torch

from vstar_engine.bench.harness.rows import ResultFile


def add_common(parser: argparse.ArgumentParser, rounds: int, limit: float) -> None:
    """Adds where rows go and how long to measure."""
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append a row per provider to this file")
    parser.add_argument("--rehearse", action="store_true", help="the same code on the CPU with tiny shapes, in seconds")
    parser.add_argument("--rounds", type=int, default=rounds, help="at most (default %(default)s)")
    parser.add_argument(
        "--limit", type=float, default=limit, metavar="SECONDS", help="rounds of one contest (default %(default)g)"
    )
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="start nothing after this")


def open_rows(args: argparse.Namespace) -> ResultFile:
    """Opens the run's rows. Turns TF32 off and cuDNN's autotuning on, for every provider."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    return ResultFile(args.out, args.command_line)
