"""One UNet forward as a sampling step runs it, both guidance branches in one batch: seconds, TFLOP/s and peak memory by
frames, memory layout and mode; the share of time by kind of block; and a matrix product of the same dtype as the ceiling.
"""

import argparse
from dataclasses import fields, replace
from pathlib import Path

import torch

from vstar_engine.config import model_named, parse_size
from vstar_engine.device import DTYPES
from vstar_engine.errors import DeviceError

from .forward import FULL, REHEARSAL, ForwardBench, Settings
from .rows import Rows
from .seeded import LAYOUTS


def exact_float32() -> None:
    """Keeps TF32 out of the references, and lets cuDNN choose its convolutions by trial for every variant alike."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag per setting; what is not given is FULL's, or with --rehearse REHEARSAL's."""
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append a row per variant to this file")
    parser.add_argument("--rehearse", action="store_true", help="the same on the CPU with the mini model, tiny")
    parser.add_argument("--model", help=f"default {FULL.model}")
    parser.add_argument("--device", help=f"default {FULL.device}")
    parser.add_argument("--dtype", choices=DTYPES, help=f"default {FULL.dtype}")
    parser.add_argument("--size", type=parse_size, metavar="HEIGHTxWIDTH", help="default {}x{}".format(*FULL.size))
    parser.add_argument("--frames", type=int, nargs="+", help="default {} {}".format(*FULL.frames))
    parser.add_argument("--rounds", type=int, help=f"default {FULL.rounds}")
    parser.add_argument("--warmup", type=int, help=f"default {FULL.warmup}")
    parser.add_argument("--compiler", help=f"the back end of torch.compile, default {FULL.compiler}")
    parser.add_argument("--compiled", choices=LAYOUTS, nargs="*", help="layouts to compile, default all")
    parser.add_argument("--matrix", type=int, help=f"side of the ceiling's matrix product, default {FULL.matrix}")
    parser.add_argument("--first-compile", type=float, metavar="SECONDS", help=f"default {FULL.first_compile:g}")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=f"default {FULL.budget:g}")


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Measures what the flags say; 1 if a variant failed."""
    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    settings = replace(REHEARSAL if args.rehearse else FULL, **{name: x for name, x in given.items() if x is not None})
    model_named(settings.model).check_size(*settings.size)
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(f"device {settings.device} is not here: PyTorch finds no GPU; use --device cpu")
    exact_float32()
    rows = Rows(args.out)
    ForwardBench(settings, rows).run()
    return 1 if rows.failures else 0
