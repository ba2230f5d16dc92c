"""Options for the model and the device, shared by commands."""

import argparse
from typing import Any

from vstar_engine.artifacts.built_engine import stated_model
from vstar_engine.backends import BACKENDS
from vstar_engine.config.models import ATTENTION_NAMES, DTYPE_NAMES, MODELS
from vstar_engine.config.sampling import FAST, FP8
from vstar_engine.model_choice import ModelChoice
from vstar_engine.weights.sources import model_of

from .weights_options import add_yes_option


def add_text_options(parser: argparse.ArgumentParser, unset: bool = False) -> None:
    """Adds the options for the model, device and dtype; with `unset` they have no default."""

    def add(name: str, help: str) -> None:
        default = getattr(ModelChoice, name)
        said = f"{help} (default{': that of --engine, else' if unset else ''} {default})"
        parser.add_argument(f"--{name}", default=None if unset else default, help=said)

    add("model", f"one of {', '.join(MODELS)}")
    said = (
        "folder made by `vstar-engine convert`, checkpoint file, diffusers folder, or owner/name[@revision][:file] of the Hub; "
        "not needed for mini, nor for a model that was pulled"
    )
    parser.add_argument("--weights", help=said)
    add_yes_option(parser)
    add("device", "cpu, cuda or cuda:N")
    add("dtype", f"one of {', '.join(DTYPE_NAMES)}")
    if unset:
        add("backend", f"one of {', '.join(BACKENDS)}")


def add_lora_option(parser: argparse.ArgumentParser) -> None:
    """Adds --lora."""
    said = "LoRA to merge into the UNet, with strength 1 by default; repeatable"
    parser.add_argument("--lora", action="append", metavar="FILE[:STRENGTH]", help=said)


def add_fast_option(parser: argparse.ArgumentParser) -> None:
    """Adds --fast."""
    words = "; ".join(f"{name}: {what}" for name, what in FAST.items())
    said = f"lossy options that save time; repeatable: {words}"
    parser.add_argument("--fast", action="append", metavar="NAME[,NAME]", help=said)


def fast_from(args: argparse.Namespace) -> tuple[tuple[str, ...], bool]:
    """Reads --fast: the options of sampling, each once, and whether the network is loaded in FP8."""
    named = tuple(dict.fromkeys(name for text in args.fast or () for name in text.split(",")))
    return tuple(name for name in named if name != FP8), FP8 in named


def own_defaults(args: argparse.Namespace) -> tuple[tuple[str, Any], ...]:
    """Returns the defaults of `Sampling` that the model of options has; none for an unknown one, which is refused later."""
    model = args.model or stated_model(args.engine) or model_of(args.weights) or ModelChoice.model
    return MODELS[model].defaults if model in MODELS else ()


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds all options of `ModelChoice`."""
    add_text_options(parser, unset=True)
    add_lora_option(parser)
    parser.add_argument("--engine", metavar="DIR", help="folder or name of an engine made by `vstar-engine build`")
    parser.add_argument(
        "--spatial-attention",
        default=ModelChoice.spatial_attention,
        help=f"attention within frames: {', '.join(ATTENTION_NAMES)} (default %(default)s)",
    )
    parser.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        default=ModelChoice.graphs,
        help="replay steps as CUDA graphs on a GPU (default on)",
    )


def choice_from(args: argparse.Namespace, text: str | None = ModelChoice.text) -> ModelChoice:
    """Returns the model that options choose, without its text tower where `text` is None."""
    names = ("model", "weights", "backend", "device", "dtype", "spatial_attention", "graphs")
    given = {name: getattr(args, name) for name in names}
    return ModelChoice.of(args.engine, **given, text=text, loras=tuple(args.lora or ()), fp8=fast_from(args)[1])
