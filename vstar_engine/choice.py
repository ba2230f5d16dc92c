"""What is loaded, and where it runs: settled and checked before PyTorch is."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from vstar_engine.artifacts.built_engine import Artifact
from vstar_engine.artifacts.manifest import read_weights
from vstar_engine.config.models import ATTENTION_NAMES, DTYPE_NAMES, MODELS, model_named
from vstar_engine.config.sampling import FAST, FP8
from vstar_engine.weights import bundled

from .backends import BACKENDS, EAGER, TENSORRT


@dataclass(frozen=True)
class Choice:
    """What is loaded: as asked for, else as the built engine says, else the defaults."""

    model: str = "videocrafter2"
    weights: str | Path | None = None
    backend: str = EAGER
    device: str = "cpu"
    dtype: str = "float32"

    @staticmethod
    def of(
        artifact: Artifact | None,
        model: str | None,
        weights: str | Path | None,
        backend: str | None,
        device: str | None,
        dtype: str | None,
    ) -> "Choice":
        """Settles each setting; EngineError where one asked for is not the built engine's."""
        asked = {"model": model, "weights": weights, "backend": backend, "device": device, "dtype": dtype}
        given = {name: value for name, value in asked.items() if value is not None}
        if artifact is None:
            return Choice(**given)  # type: ignore[arg-type]
        other = {} if weights is None else {"weights_path": weights}
        artifact.check(other, **{name: given[name] for name in ("model", "backend", "dtype") if name in given})
        own = {name: artifact.identity[name] for name in ("model", "backend", "dtype")}
        own["device"] = "cpu" if artifact.identity["device"].startswith("cpu") else "cuda"
        return Choice(**{**own, "weights": artifact.manifest["weights_path"], **given})

    def check_weights(self) -> None:
        """Raises CheckpointError for weights that are damaged or another model's, by their hashes and manifest alone."""
        spec = model_named(self.model)
        path = Path(self.weights or bundled.weights(spec))
        bundled.check_model(read_weights(path), path, spec)


def check_options(artifact: Artifact, spatial_attention: str, graphs: bool) -> None:
    """Raises ValueError for an option that changes nothing in a built engine."""
    if spatial_attention != "auto":
        said = f"{artifact.folder} attends within frames as it was built to, got spatial attention {spatial_attention!r}"
        raise ValueError(f"{said}; leave the option out, or run without a built engine")
    if not graphs and artifact.identity["backend"] not in TENSORRT:
        said = f"back end {artifact.identity['backend']} of {artifact.folder} records no CUDA graphs to do without"
        raise ValueError(f"{said}; leave out --no-graphs (graphs=False)")


def add_text_options(parser: argparse.ArgumentParser, unset: bool = False) -> None:
    """Adds the options that say which model runs, and where; `unset`: without defaults, since a built engine may say it."""

    def add(name: str, help: str) -> None:
        default = getattr(Choice, name)
        said = f"{help} (default{': as the built engine, else' if unset else ''} {default})"
        parser.add_argument(f"--{name}", default=None if unset else default, help=said)

    add("model", f"one of {', '.join(MODELS)}")
    parser.add_argument("--weights", help="folder made by `vstar-engine convert`; mini has its own")
    add("device", "cpu, cuda or cuda:N")
    add("dtype", f"one of {', '.join(DTYPE_NAMES)}")
    if unset:
        add("backend", f"one of {', '.join(BACKENDS)}")


def add_lora_option(parser: argparse.ArgumentParser) -> None:
    """Adds --lora."""
    said = "merge a LoRA into the UNet, by default with strength 1; repeatable"
    parser.add_argument("--lora", action="append", metavar="FILE[:STRENGTH]", help=said)


def add_fast_option(parser: argparse.ArgumentParser) -> None:
    """Adds --fast."""
    words = "; ".join(f"{name}: {what}" for name, what in FAST.items())
    said = f"sooner, but no longer exactly the same video: {words}"
    parser.add_argument("--fast", action="append", metavar="NAME[,NAME]", help=said)


def fast_from(args: argparse.Namespace) -> tuple[tuple[str, ...], bool]:
    """Reads --fast: what a video is sampled with, each name once, and whether the network is loaded in FP8."""
    named = tuple(dict.fromkeys(name for text in args.fast or () for name in text.split(",")))
    return tuple(name for name in named if name != FP8), FP8 in named


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds all that says what is loaded; a built engine may say it too."""
    add_text_options(parser, unset=True)
    add_lora_option(parser)
    parser.add_argument("--engine", metavar="DIR", help="engine made by `vstar-engine build`, or its name")
    parser.add_argument(
        "--spatial-attention", default="auto", help=f"one of {', '.join(ATTENTION_NAMES)} (default %(default)s)"
    )
    parser.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU, replay the network's steps as CUDA graphs (default on)",
    )
