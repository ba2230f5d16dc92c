"""An ONNX file to a TensorRT plan: parsed, its plugins counted, profiles laid over its free axes, built, and counted again.

`trt` is the library's module, `tensorrt` or `tensorrt_rtx`: what they have in common is what is used here, and the rest is told
apart by what the module has.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vstar_engine.artifacts.files import write_aside
from vstar_engine.backends.tensorrt_library import make_logger
from vstar_engine.errors import ExportError

from .build_settings import Settings

MIB = 2**20
# an axis's name -> the least, the best served and the largest size
Ranges = Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Plan:
    """How a plan is built.

    `profiles` give the ranges of the free axes, one profile each; the rest is as in `Settings`.
    """

    profiles: tuple[Ranges, ...]
    workspace: int = Settings.workspace
    level: int = Settings.level
    refit: str = Settings.refit
    compatibility: str = Settings.compatibility
    targets: tuple[str, ...] = Settings.targets
    timing_cache: Path | None = None


def frame_profiles(frames: tuple[int, ...], others: Ranges) -> tuple[Ranges, ...]:
    """Returns a profile for each bucket of frames, which begins where the one before it ends; `others` are the same in all."""
    starts = (1, *(count + 1 for count in frames))
    return tuple({**others, "frames": (low, high, high)} for low, high in zip(starts, frames, strict=False))


def make_monitor(trt: Any, report: Callable[[str], None]) -> Any:
    """Returns a monitor that reports a build's outermost phases as they go, in tenths."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.steps[phase_name] = num_steps
                report(f"{phase_name}: {num_steps} steps")

        def step_complete(self, phase_name: str, step: int) -> bool:
            total = self.steps.get(phase_name, 0)
            if total and 10 * (step + 1) // total > 10 * step // total:
                report(f"{phase_name}: {100 * (step + 1) // total} %")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _failed(what: str, said: list[str]) -> ExportError:
    return ExportError(f"{what}: {'; '.join(said[:3]) or 'TensorRT gives no reason'}")


def parse(trt: Any, builder: Any, logger: Any, path: Path) -> tuple[Any, Any]:
    """Parses a file into a strongly typed network; returns it with its parser, which must outlive it."""
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        said = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise _failed(f"TensorRT {trt.__version__} cannot parse {path.name}", said or logger.errors)
    return network, parser


def count_plugins(trt: Any, network: Any) -> int:
    """Counts the plugin layers of a parsed network."""
    return sum(network.get_layer(index).type == trt.LayerType.PLUGIN_V3 for index in range(network.num_layers))


def check_count(found: int, wanted: int, where: str) -> None:
    """Raises ExportError unless each node became a plugin: TensorRT decomposes what it does not recognise, without a word."""
    if found != wanted:
        raise ExportError(
            f"{where} holds {found} plugin layers where the file has {wanted} temporal attentions for a plugin; "
            "TensorRT decomposed the others (is the plugin registered with the namespace and version that the nodes carry?)"
        )


def add_profile(builder: Any, config: Any, network: Any, ranges: Ranges) -> None:
    """Adds an optimisation profile that gives every free axis, known by its name in the file, its range."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 not in shape:
            continue
        names = [tensor.get_dimension_name(axis) for axis in range(len(shape))]
        unknown = [name for name, size in zip(names, shape, strict=True) if size == -1 and name not in ranges]
        if unknown:
            raise ExportError(f"input {tensor.name} has free axes {', '.join(map(repr, unknown))} that no profile describes")
        sizes = [ranges[name] if size == -1 else (size,) * 3 for name, size in zip(names, shape, strict=True)]
        profile.set_shape(tensor.name, *zip(*sizes, strict=True))
    if config.add_optimization_profile(profile) < 0:
        raise ExportError(f"TensorRT refuses the profile {dict(ranges)}")


def configure(trt: Any, builder: Any, network: Any, plan: Plan, monitor: Any) -> Any:
    """Makes the builder's configuration."""
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, MIB * plan.workspace)
    config.builder_optimization_level = plan.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = monitor
    for ranges in plan.profiles:
        add_profile(builder, config, network, ranges)
    if plan.refit != "no":
        config.set_flag(trt.BuilderFlag.REFIT)
    if plan.refit == "stripped":
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    levels = trt.HardwareCompatibilityLevel
    if plan.compatibility != "exact":
        wanted = {"capability": levels.SAME_COMPUTE_CAPABILITY, "ampere": levels.AMPERE_PLUS}
        config.hardware_compatibility_level = wanted[plan.compatibility]
    _set_targets(trt, config, plan.targets)
    if plan.timing_cache is not None:
        stored = plan.timing_cache.read_bytes() if plan.timing_cache.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(stored), ignore_mismatch=False):
            raise ExportError(f"{plan.timing_cache} is another machine's timing cache; remove it and build again")
    return config


def _set_targets(trt: Any, config: Any, targets: tuple[str, ...]) -> None:
    if not targets:
        return
    if not hasattr(trt, "ComputeCapability"):
        raise ValueError("targets are for backend tensorrt-rtx; a tensorrt engine is built on the GPU that runs it")
    known = trt.ComputeCapability.__members__
    unknown = [target for target in targets if target not in known]
    if unknown:
        usable = ", ".join(name for name in known if name.startswith("SM"))
        raise ValueError(f"unknown targets {', '.join(unknown)}; TensorRT for RTX {trt.__version__} knows {usable}")
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(known[target], index)


def count_in_engine(information: str) -> int:
    """Counts the plugin layers that an engine's description (JSON, detailed) names, once for all profiles together."""
    layers = json.loads(information)["Layers"]
    named = [layer for layer in layers if isinstance(layer, dict) and "plugin" in layer.get("LayerType", "").lower()]
    return len({re.sub(r"\s*\[profile \d+\]$", "", layer["Name"]) for layer in named})


def inspect(trt: Any, logger: Any, plan: Any) -> int:
    """Counts the plugin layers of a plan by loading it, which takes the GPU that it is for."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise _failed("TensorRT cannot load the plan that it built", logger.errors)
    return count_in_engine(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def build_plan(
    trt: Any, onnx: Path, out: Path, plan: Plan, plugins: int, report: Callable[[str], None], inspected: bool = False
) -> dict[str, Any]:
    """Builds `onnx`, whose `plugins` nodes must each become a plugin layer, into `out`; returns facts for a manifest.

    Raises ExportError with TensorRT's own words where a step fails. `inspected` counts again in the engine.
    """
    logger = make_logger(trt, report)
    builder = trt.Builder(logger)
    report(f"parsing {onnx.name}")
    network, _parser = parse(trt, builder, logger, onnx)
    check_count(count_plugins(trt, network), plugins, "the parsed network")
    config = configure(trt, builder, network, plan, make_monitor(trt, report))
    report(f"building a plan with {len(plan.profiles)} profiles from {network.num_layers} layers")
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise _failed(f"TensorRT {trt.__version__} cannot build {onnx.name}", logger.errors)
    if inspected:
        check_count(inspect(trt, logger, built), plugins, "the built engine")
    out.write_bytes(built)
    if plan.timing_cache is not None:
        with write_aside(plan.timing_cache) as aside:
            aside.write_bytes(config.get_timing_cache().serialize())
    return {
        "plugin_layers": plugins,
        "layers": network.num_layers,
        "bytes": out.stat().st_size,
        "profiles": list(plan.profiles),
    }
