"""The `export` command: a built engine written for another server."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.config.models import model_named
from vstar_engine.export.builders import EXPORTERS, exporter_named
from vstar_engine.loading import open_weights


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `export`."""
    parser.add_argument("kind", choices=EXPORTERS, help="a model repository of Triton Inference Server")
    parser.add_argument("engine", metavar="DIR", help="engine made by `vstar-engine build`, or its name")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--weights", help="folder made by `vstar-engine convert`, where the engine's has moved")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")


def run(args: argparse.Namespace) -> int:
    """Writes a built engine for another server."""
    artifact = BuiltEngine.open(args.engine)
    path = args.weights or artifact.manifest["weights_path"]
    weights = open_weights(model_named(artifact.identity["model"]), path, artifact.manifest["loras"])
    artifact.check({"weights_path": path}, weights=weights.fingerprint())
    exporter = exporter_named(args.kind)
    told = exporter.write(artifact, weights, args.out, args.force, lambda line: tqdm.write(line, file=sys.stderr))
    command = " ".join([f"tritonserver --model-repository={args.out}", *told])
    print(f"wrote {args.out}; {command}, with vstar-engine installed beside it")
    return 0
