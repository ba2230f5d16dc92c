"""Runs our TensorRT code on stand-ins that take only what the real bindings declare: a child of test_tensorrt_calls.py.

Every name, and the number and names of every call's arguments, are held to the bindings' classes and to the signatures that
pybind11 wrote into their documentation. Values come from a table: there is no library.
"""

import ast
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import tensorrt_bindings as trt
import torch

sys.modules["tensorrt"] = trt
ROOT = Path(__file__).parents[2]
CODE = sorted(
    path
    for folder, names in (("export", "*tensorrt*.py"), ("kernels/tensorrt", "*.py"), ("vstar_engine/backends", "tensorrt*.py"))
    for path in (ROOT / folder).glob(names)
)
# what the code asks for first whether it is there
OPTIONAL = {"trt.ComputeCapability", "trt.SerializationFlag.INCLUDE_REFIT"}
LAYERS = [{"Name": "first", "LayerType": "PluginV3"}, {"Name": "first [profile 1]", "LayerType": "PluginV3"}, {"Name": "x"}]
SHAPES = [(1, 4, 1, 8, 8), (2, 4, 4, 8, 8), (2, 4, 4, 8, 8)]
Parameter = inspect.Parameter


def split(arguments: str) -> list[str]:
    """Splits a signature's arguments at its outermost commas."""
    parts, depth = [""], 0
    for character in arguments:
        depth += (character in "[(<{") - (character in "])>}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def signatures(documented: str, name: str) -> Iterator[tuple[inspect.Signature, str]]:
    """Yields each overload that pybind11 documents, and the type that it returns."""
    for found in re.finditer(rf"^(?:\d+\. )?{re.escape(name)}\((.*)\) -> (.+)$", documented, re.M):
        parameters = []
        for argument in split(found[1]):
            called, _, kind = argument.partition(":")
            default = kind.partition(" = ")[2] or Parameter.empty
            # an argument without a name is by position
            placed = Parameter.POSITIONAL_ONLY if re.fullmatch(r"arg\d+", called) else Parameter.POSITIONAL_OR_KEYWORD
            parameters.append(Parameter(called, placed, default=default))
        if any(parameter.kind is Parameter.POSITIONAL_ONLY for parameter in parameters):
            parameters = [parameter.replace(kind=Parameter.POSITIONAL_ONLY) for parameter in parameters]
        yield inspect.Signature(parameters), found[2].strip()


class StandIn:
    """An object of a class of the bindings that knows its attributes and signatures, and no more."""

    def __init__(self, kind: type):
        object.__setattr__(self, "_kind", kind)

    def _declared(self, name: str) -> Any:
        found = inspect.getattr_static(self._kind, name, None) or getattr(self._kind, name, None)
        if found is None:
            raise AttributeError(f"{self._kind.__name__} has no {name} in TensorRT {trt.__version__}")
        return found

    def __getattr__(self, name: str) -> Any:
        declared = self._declared(name)
        path = f"{self._kind.__name__}.{name}"
        if isinstance(declared, property):
            return VALUES.get(path)

        def call(*arguments: Any, **named: Any) -> Any:
            return called(path, getattr(self._kind, name).__doc__, (self, *arguments), named)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        declared = self._declared(name)
        if not isinstance(declared, property) or declared.fset is None:
            raise AttributeError(f"{self._kind.__name__}.{name} cannot be set in TensorRT {trt.__version__}")


def called(path: str, documented: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Binds a call to one of the documented overloads; returns the table's value, or a stand-in of the documented type."""
    overloads = list(signatures(documented or "", path.rpartition(".")[2]))
    assert overloads, f"{path} documents no signature"
    refused = []
    for signature, result in overloads:
        try:
            signature.bind(*arguments, **named)
        except TypeError as error:
            refused.append(f"{signature}: {error}")
            continue
        if path in VALUES:
            value = VALUES[path]
            return next(value) if isinstance(value, Iterator) else value
        kind = getattr(trt, result.rpartition(".")[2], None)
        return StandIn(kind) if inspect.isclass(kind) else True if result == "bool" else None
    raise TypeError(f"{path} in TensorRT {trt.__version__} takes no such call: {'; '.join(refused)}")


class Library:
    """The bindings, with stand-ins for what the missing library would make."""

    MADE = ("Builder", "OnnxParser", "OnnxParserRefitter", "Refitter", "Runtime")
    FOUND = ("get_plugin_registry",)

    def __getattr__(self, name: str) -> Any:
        real = getattr(trt, name)
        if name in self.FOUND:
            return lambda *arguments, **named: called(name, real.__doc__, arguments, named)
        if name not in self.MADE:
            return real

        def make(*arguments: Any, **named: Any) -> StandIn:
            made = StandIn(real)
            called(f"{name}.__init__", real.__init__.__doc__, (made, *arguments), named)
            return made

        return make


VALUES: dict[str, Any] = {
    "get_plugin_registry": StandIn(trt.IPluginRegistry),
    "Builder.build_serialized_network": b"plan",
    "INetworkDefinition.num_layers": 1,
    "INetworkDefinition.num_inputs": 1,
    "ILayer.type": trt.LayerType.PLUGIN_V3,
    "ITensor.shape": (-1, 4, -1, 8, 8),
    "ITensor.name": "latents",
    "OnnxParser.num_errors": 1,
    "OnnxParser.get_error": StandIn(trt.ParserError),
    "ParserError.desc": "a node",
    "OnnxParserRefitter.num_errors": 1,
    "OnnxParserRefitter.get_error": StandIn(trt.ParserError),
    "IBuilderConfig.add_optimization_profile": 0,
    "ITimingCache.serialize": b"timings",
    "EngineInspector.get_engine_information": json.dumps({"Layers": LAYERS}),
    "ICudaEngine.num_optimization_profiles": 1,
    "ICudaEngine.get_tensor_profile_shape": SHAPES,
    "ICudaEngine.refittable": True,
    "ICudaEngine.serialize_with_config": b"refitted",
    "IExecutionContext.update_device_memory_size_for_shapes": 256,
    "Refitter.get_missing_weights": [],
}


def unresolved() -> list[str]:
    """Lists the names below `trt` in the project's code that the bindings do not have."""
    missing = set()
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            chain = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if not re.fullmatch(r"(self\.)?trt(\.\w+)+", chain):
                continue
            here: Any = trt
            named = "trt"
            for part in chain.removeprefix("self.").split(".")[1:]:
                named += f".{part}"
                if not hasattr(here, part):
                    missing.add(f"{path.name}: {named}")
                    break
                here = getattr(here, part)
                if not (inspect.isclass(here) or hasattr(here, "__members__")):
                    break
    return sorted(name for name in missing if name.partition(": ")[2] not in OPTIONAL)


Lines = set[tuple[str, int]]


def watch() -> Lines:
    """Returns the set of the project's lines that run from now on, by file and number; it grows."""
    ran: Lines = set()
    names = {str(path): path.name for path in CODE}

    def line(frame: FrameType, event: str, _: Any) -> Any:
        ran.add((names[frame.f_code.co_filename], frame.f_lineno))
        return line

    sys.settrace(lambda frame, event, _: line if frame.f_code.co_filename in names else None)
    return ran


def unexecuted(ran: Lines) -> list[str]:
    """Lists the statements that speak to `trt` and did not run, but for what is only an error's words."""
    missing = []
    for path in CODE:
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if not isinstance(node, ast.stmt) or isinstance(node, ast.Raise | ast.FunctionDef | ast.ClassDef):
                    continue
                own = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
                said = {found for part in own for found in re.findall(r"\btrt(?:\.(?!__)\w+)+", ast.unparse(part))}
                lines = {(path.name, number) for part in own for number in range(part.lineno, (part.end_lineno or 0) + 1)}
                if said - OPTIONAL and not lines & ran:
                    missing.append(f"{path.name}:{node.lineno}: {ast.unparse(node).splitlines()[0]}")
    return sorted(set(missing))


def plant(fault: str) -> None:
    """Adds a call that the bindings would refuse."""
    from vstar_engine.backends import tensorrt_plugins
    from vstar_engine.export import tensorrt_plan

    registered = tensorrt_plugins._register

    def register(library: Any, *rest: Any) -> Any:
        if fault == "registry":
            _ = library.get_plugin_registry().plugin_creator_list
        return registered(library, *rest)

    tensorrt_plugins._register = register
    configured = tensorrt_plan.configure

    def configure(library: Any, *rest: Any) -> Any:
        config = configured(library, *rest)
        if fault == "removed flag":
            config.set_flag(library.BuilderFlag.FP16)
        if fault == "removed attribute":
            _ = config.int8_calibrator
        if fault == "arity":
            config.set_flag()
        if fault == "keyword":
            StandIn(trt.IExecutionContext).execute_async_v3(stream=0)
        return config

    tensorrt_plan.configure = configure


def build(folder: Path) -> list[int]:
    """Builds with every option, and by every way out; returns what each plan weighs."""
    from vstar_engine.backends.tensorrt_library import make_logger
    from vstar_engine.errors import ExportError
    from vstar_engine.export import tensorrt_plan as under_test

    library, onnx = Library(), folder / "unet.onnx"
    profiles = under_test.frame_profiles((4, 8), {"batch": (1, 2, 2)})
    VALUES["ITensor.get_dimension_name"] = "frames"
    sizes = []
    for refit, compatibility in (("no", "exact"), ("yes", "capability"), ("stripped", "ampere")):
        plan = under_test.Plan(profiles, refit=refit, compatibility=compatibility, timing_cache=folder / "timings")
        facts = under_test.build_plan(library, onnx, folder / "unet.plan", plan, 1, lambda line: None, inspected=True)
        sizes.append(facts["bytes"])
    for step in ("OnnxParser.parse_from_file", "IBuilderConfig.set_timing_cache"):
        VALUES[step] = False
        try:
            under_test.build_plan(library, onnx, folder / "unet.plan", plan, 1, lambda line: None)
        except ExportError:
            del VALUES[step]
    logger = make_logger(trt, lambda line: None)
    logger.log(trt.ILogger.WARNING, "slow")
    logger.log(trt.ILogger.ERROR, "wrong")
    assert logger.errors == ["wrong"]
    monitor = under_test.make_monitor(trt, lambda line: None)
    monitor.phase_start("building", None, 4)
    assert monitor.step_complete("building", 0)
    monitor.phase_finish("building")
    return sizes


def open_plans(folder: Path) -> list[str]:
    """Opens a plan with each plugin that must be registered to run it, and one that TensorRT refuses; returns the ends."""
    from vstar_engine.backends import tensorrt as under_test
    from vstar_engine.backends import tensorrt_plugins
    from vstar_engine.errors import EngineError

    # what needs a GPU: its context, and the tensors that are bound
    under_test.torch.cuda.device = lambda device: nullcontext()
    under_test.TensorrtUnet = lambda library, engine, *rest, **kept: engine
    (folder / "unet.plan").write_bytes(b"plan")
    os.environ[tensorrt_plugins.LIBRARY] = str(folder / "unet.plan")
    ends = []
    for kind in ("python", "cpp", "refused"):
        tensorrt_plugins._registered.clear()
        VALUES["IPluginRegistry.get_creator"] = iter([None, StandIn(trt.IPluginCreatorV3One)])
        if kind == "refused":
            VALUES["Runtime.deserialize_cuda_engine"] = None
        options = {"plugin": "python" if kind == "refused" else kind}
        artifact = SimpleNamespace(identity={"options": options}, folder=folder, file=folder.joinpath, command=lambda: "build")
        try:
            ends.append(under_test.open_plan(Library(), artifact, torch.device("cuda"), torch.float32)._kind.__name__)
        except EngineError as error:
            ends.append(str(error).replace(str(folder), "DIR"))
    del VALUES["Runtime.deserialize_cuda_engine"]
    return ends


def run() -> list[list[int]]:
    """Runs an engine at two shapes, the first one twice; returns the shapes that came out."""
    from vstar_engine.backends import tensorrt as under_test

    under_test.stream_of = lambda device: 0
    network = under_test.TensorrtUnet(Library(), StandIn(trt.ICudaEngine), torch.device("cpu"), torch.float32)
    results = []
    for frames in (2, 4, 2):
        arguments = torch.zeros(2, 1), torch.zeros(2, 1, 77, 8), torch.zeros(2), torch.zeros(1, 2, frames)
        results.append(list(network(torch.zeros(2, 4, frames, 8, 8), *arguments).shape))
    assert len(network.bound) == 2
    return results


def refit(folder: Path) -> int:
    """Refits a plan; returns the size of the result."""
    from vstar_engine.errors import EngineError
    from vstar_engine.export.tensorrt_refit import refit_plan

    (folder / "unet.plan").write_bytes(b"plan")
    places = folder / "unet.plan", folder / "unet.onnx", folder / "refitted.plan"
    VALUES["OnnxParserRefitter.refit_from_file"] = False
    try:
        refit_plan(Library(), *places, lambda line: None)
    except EngineError:
        del VALUES["OnnxParserRefitter.refit_from_file"]
    return refit_plan(Library(), *places, lambda line: None)["bytes"]


def enqueue() -> float:
    """Runs the Python plugin as TensorRT does, on addresses, in Triton's interpreter; returns its error."""
    from vstar_engine.kernels.temporal_attention import temporal_attention_ref
    from vstar_engine.kernels.tensorrt.python_plugin import classes

    made, creator = classes(trt)
    plugin = creator().create_plugin("VstarTemporalAttention", trt.PluginFieldCollection([]), trt.TensorRTPhase.RUNTIME)
    assert isinstance(plugin.clone(), made)
    assert isinstance(plugin.attach_to_context(None), made)
    q, k, v = torch.randn(3, 1, 5, 2, 1, 16)
    tensors = [q, k, v, torch.randn(1, 5), torch.full_like(q, torch.nan)]
    described, dynamic = [], []
    for tensor in tensors:
        one, several = trt.PluginTensorDesc(), trt.DynamicPluginTensorDesc()
        one.dims, one.type, one.format = tuple(tensor.shape), trt.DataType.FLOAT, trt.TensorFormat.LINEAR
        several.desc = one
        described.append(one)
        dynamic.append(several)
    assert len(plugin.get_output_shapes([trt.DimsExprs(5)], [], None)) == 1
    assert len(plugin.get_fields_to_serialize()) == 0
    assert plugin.get_output_data_types([trt.DataType.FLOAT] * 4) == [trt.DataType.FLOAT]
    assert all(plugin.supports_format_combination(index, dynamic, 4) for index in range(5))
    wrong = trt.DynamicPluginTensorDesc()
    wrong.desc.type, wrong.desc.format = trt.DataType.HALF, trt.TensorFormat.LINEAR
    assert not plugin.supports_format_combination(3, [*dynamic[:3], wrong, dynamic[4]], 4)
    addresses = [tensor.data_ptr() for tensor in tensors]
    plugin.enqueue(described[:4], described[4:], addresses[:4], addresses[4:], 0, 0)
    return float((tensors[4] - temporal_attention_ref(*tensors[:4])).abs().max())


def main(request: dict[str, Any]) -> dict[str, Any]:
    folder = Path(request["folder"])
    if request.get("fault"):
        plant(request["fault"])
        try:
            build(folder)
            open_plans(folder)
        except (AttributeError, TypeError) as error:
            return {"refused": str(error)}
        return {"refused": ""}
    ran = watch()
    found = {"built": build(folder), "ran": run(), "refitted": refit(folder), "opened": open_plans(folder)}
    found["enqueued"] = enqueue()
    sys.settrace(None)
    return {"version": trt.__version__, "unresolved": unresolved(), "unexecuted": unexecuted(ran), **found}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
