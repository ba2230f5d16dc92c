"""The `refit` command: other weights in a built TensorRT engine."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.artifacts.source_hash import engine_hash
from vstar_engine.backends import backend_named
from vstar_engine.commands.model_options import add_lora_option
from vstar_engine.commands.weights_options import add_yes_option, with_weights
from vstar_engine.errors import EngineError
from vstar_engine.export.build_engine import build
from vstar_engine.export.build_settings import Settings
from vstar_engine.loading import open_weights
from vstar_engine.machine.device import device_named, dtype_named
from vstar_engine.model_choice import ModelChoice


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `refit`."""
    parser.add_argument("engine", metavar="DIR", help="engine made by `vstar-engine build --refit yes`, or its name")
    parser.add_argument("--weights", help="folder made by `vstar-engine convert`, of the same shapes (default: the engine's)")
    add_yes_option(parser)
    add_lora_option(parser)
    parser.add_argument("--out", type=Path, help="the new engine's folder (default: one named by its content)")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")


def run(args: argparse.Namespace) -> int:
    """Swaps the weights of a built engine without building it again."""
    artifact = BuiltEngine.open(args.engine)
    _check_refittable(artifact, args.weights, args.lora or [])
    device = device_named("cuda", dtype_named(artifact.identity["dtype"]))
    here = backend_named(artifact.identity["backend"]).requirements(device, artifact.identity["options"])
    artifact.check(sources=engine_hash(), **here)
    # what is written holds its weights, even where the source was stripped of them
    settings = replace(Settings.of(artifact.identity, device), refit="yes")
    if args.weights is not None:
        choice = ModelChoice(settings.spec.name, args.weights, dtype=artifact.identity["dtype"])
        args.weights = with_weights(choice, args.yes).weights
    weights = open_weights(settings.spec, args.weights or artifact.manifest["weights_path"], args.lora or ())
    made = build(settings, weights, args.out, args.force, lambda line: tqdm.write(line, file=sys.stderr), artifact)
    merged = "".join(f" and {lora}" for lora in made.manifest["loras"])
    print(f"{made.folder}: the engine of {artifact.name} with the weights of {weights.path}{merged}")
    return 0


def _check_refittable(artifact: BuiltEngine, weights: str | None, loras: list[str]) -> None:
    """Raises EngineError, with what builds an engine of the other weights, for one that cannot take them."""
    backend, options = artifact.identity["backend"], artifact.identity["options"]
    if backend != "tensorrt":
        other = artifact.command(weights_path=weights or artifact.manifest["weights_path"], loras=loras)
        said = f"{artifact.folder} is for backend {backend}, whose engines keep the weights that they were built with"
        raise EngineError(f"{said}; build one with the others: {other}")
    if options["refit"] == "no":
        rebuild = artifact.command(options={**options, "refit": "yes"})
        raise EngineError(f"{artifact.folder} was not built for other weights; rebuild it: {rebuild}")
