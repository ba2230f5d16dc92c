"""The `pull` command: a model's weights from the Hub, converted once into the cache."""

import argparse
import json
from pathlib import Path

from vstar_engine.artifacts.manifest import read_stated
from vstar_engine.config.model_sources import SOURCES
from vstar_engine.config.models import DTYPE_NAMES, MODELS, model_named
from vstar_engine.weights.bundled import BUNDLED
from vstar_engine.weights.converted import STORED, Entry
from vstar_engine.weights.sources import GB, OnProgress, model_of, obtain

from .weights_options import agree, conversion_bar


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `pull`."""
    parser.add_argument("source", help=f"{', '.join(SOURCES)}, or what --weights takes, such as owner/name[@revision][:file]")
    parser.add_argument("--model", help=f"model that the weights are of: one of {', '.join(MODELS)} (default: by the source)")
    said = f"stored as one of {', '.join(DTYPE_NAMES)}, or {STORED}: as in the source (default %(default)s)"
    parser.add_argument("--dtype", default=STORED, choices=(*DTYPE_NAMES, STORED), help=said)
    said = "of a UNet alone: where its autoencoder and its text tower come from, such as modelscope or what --weights takes"
    parser.add_argument("--parts", metavar="SOURCE", help=said)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs `pull`."""
    weights = None if args.source in MODELS else args.source
    model = args.source if weights is None else args.model or model_of(weights) or "videocrafter2"
    model_named(model)
    if args.source in BUNDLED:
        raise ValueError(f"model {args.source} comes with its weights; there is nothing to pull")
    with conversion_bar() as on_progress:
        parts = None if args.parts is None else _parts(args.parts, model, args.dtype, on_progress)
        folder = obtain(weights, model, args.dtype, agree, on_progress, parts)
    manifest = read_stated(folder)
    if not manifest:
        raise ValueError(f"{args.source} is loaded as it is; there is nothing to pull")
    entry = Entry(folder, manifest)
    if args.json:
        print(json.dumps({"folder": str(folder), "model": model, "bytes": entry.bytes, "origin": entry.origin}))
    else:
        print(f"{folder}: {entry.origin}, {entry.bytes / GB:.2f} GB in {manifest['dtype']}")
        named = f" --weights {args.source}" if weights else ""
        print(f'vstar-engine generate "a meadow from winter to spring" --model {model}{named}')
    return 0


def _parts(source: str, model: str, dtype: str, on_progress: OnProgress) -> Path:
    """Returns the folder of weights that the other networks of a UNet alone come from, pulled where it must be."""
    weights = None if source in MODELS else source
    return obtain(weights, source if weights is None else model_of(weights) or model, dtype, agree, on_progress)
