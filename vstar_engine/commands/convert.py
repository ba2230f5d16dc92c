"""The `convert` command: an official checkpoint to safetensors."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from vstar_engine.artifacts.manifest import read_stated
from vstar_engine.config.models import DTYPE_NAMES, MODELS

MIB = 2**20


def add_options(parser: argparse.ArgumentParser) -> None:
    from vstar_engine.weights.convert import GUIDANCE, LORA_FILE, SHARD_BYTES
    from vstar_engine.weights.converted import STORED

    said = (
        "checkpoint (.ckpt, .pt, .safetensors) in the official key naming, a diffusers folder, or a pickled LoRA (named, or "
        "T2V-Turbo's list)"
    )
    parser.add_argument("source", type=Path, help=said)
    parser.add_argument("out", type=Path, help=f"folder to make; of a LoRA a file that ends in {LORA_FILE}")
    parser.add_argument("--model", default="videocrafter2", help=f"one of {', '.join(MODELS)} (default %(default)s)")
    parser.add_argument(
        "--dtype",
        default="float16",
        help=f"stored as one of {', '.join(DTYPE_NAMES)}, or {STORED}: as in the source (default %(default)s)",
    )
    parser.add_argument(
        "--shard-size", type=int, default=SHARD_BYTES // MIB, metavar="MIB", help="largest file (default %(default)s)"
    )
    said = "of a UNet alone: folder of weights with its autoencoder and its text tower"
    parser.add_argument("--parts", type=Path, metavar="DIR", help=said)
    parser.add_argument("--memory-limit", type=int, metavar="MIB", help="most memory the reading process may hold")
    said = "of a LoRA that was trained to be told a guidance scale: which (default %(default)s)"
    parser.add_argument("--embedded-guidance", type=float, default=GUIDANCE, metavar="SCALE", help=said)
    parser.add_argument("--force", action="store_true", help="replace what exists")


def run(args: argparse.Namespace) -> int:
    from vstar_engine.weights.convert import LORA_FILE, convert, convert_lora

    limit = None if args.memory_limit is None else args.memory_limit * MIB
    if args.out.suffix.lower() == LORA_FILE:
        convert_lora(args.source, args.out, args.model, args.embedded_guidance, args.force, limit)
        print(f"wrote {args.out}: {args.out.stat().st_size / MIB:.0f} MiB, for --lora {args.out}")
        return 0
    with tqdm(desc="convert", unit="tensor", file=sys.stderr, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        how = (args.dtype, args.shard_size * MIB, args.force, limit, progress)
        convert(args.source, args.out, args.model, *how, parts=args.parts)
    files, dtype = sorted(args.out.iterdir()), read_stated(args.out)["dtype"]
    print(f"wrote {args.out}: {len(files)} files, {sum(file.stat().st_size for file in files) / MIB:.0f} MiB in {dtype}")
    return 0
