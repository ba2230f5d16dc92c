"""Walks the quickly deployable plugin through what a builder asks of it, with the real bindings and no TensorRT library.

A child process of test_tensorrt_plugin.py. The bindings' own code runs; only what the library would give it is replaced:
the registry, and dimension expressions, which here are functions of concrete input shapes.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tensorrt_bindings as trt

sys.modules["tensorrt"] = trt
OPERATIONS: dict[Any, Callable[[int, int], int]] = {
    trt.DimensionOperation.SUM: lambda a, b: a + b,
    trt.DimensionOperation.SUB: lambda a, b: a - b,
    trt.DimensionOperation.PROD: lambda a, b: a * b,
    trt.DimensionOperation.MAX: max,
    trt.DimensionOperation.MIN: min,
    trt.DimensionOperation.FLOOR_DIV: lambda a, b: a // b,
    trt.DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
    trt.DimensionOperation.EQUAL: lambda a, b: int(a == b),
    trt.DimensionOperation.LESS: lambda a, b: int(a < b),
}
Shapes = list[list[int]]


class Expression:
    """Stands for trt.IDimensionExpr."""

    def __init__(self, value: Callable[[Shapes], int], constant: int | None = None):
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant is not None

    def get_constant_value(self) -> int | None:
        return self.constant

    def is_size_tensor(self) -> bool:
        return False


class ExpressionBuilder:
    """Stands for trt.IExprBuilder."""

    def constant(self, value: int) -> Expression:
        return Expression(lambda shapes: value, value)

    def operation(self, operation: Any, a: Expression, b: Expression) -> Expression:
        apply = OPERATIONS[operation]
        if a.constant is not None and b.constant is not None:
            return self.constant(apply(a.constant, b.constant))
        return Expression(lambda shapes: apply(a.value(shapes), b.value(shapes)))


class Dimensions(list):
    """Stands for trt.DimsExprs."""

    def __init__(self, length: int | list[Expression]):
        super().__init__([None] * length if isinstance(length, int) else length)


class Argument:
    """Stands for trt.ISymExpr."""

    def __init__(self, expression: Any):
        self.expr = expression._expr


class Arguments(list):
    """Stands for the setter that receives a launch's integers."""

    @property
    def nbSymExprs(self) -> int:
        return len(self)

    @nbSymExprs.setter
    def nbSymExprs(self, length: int) -> None:
        self[:] = [None] * length


class Registry(dict):
    """Stands for trt.IPluginRegistry."""

    def register_creator(self, creator: Any, namespace: str = "") -> bool:
        return self.setdefault((creator.name, creator.plugin_version, namespace), creator) is creator

    def get_creator(self, name: str, version: str, namespace: str = "") -> Any:
        return self.get((name, version, namespace))


class Launch:
    """Receives the launch's sizes."""


def load() -> Registry:
    """Replaces what the library would give, and lets `tensorrt.plugin` be imported under the name that it has."""
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    trt.IDimensionExpr, trt.DimsExprs = Expression, Dimensions
    import tensorrt_bindings.plugin
    from tensorrt_bindings.plugin import _tensor

    sys.modules["tensorrt.plugin"] = tensorrt_bindings.plugin
    _tensor.SymExprImpl = Argument
    return registry


def described(kind: Any, dims: list[int], low: list[int], high: list[int]) -> Any:
    tensor = trt.PluginTensorDesc()
    tensor.dims, tensor.type, tensor.format = dims, kind, trt.TensorFormat.LINEAR
    dynamic = trt.DynamicPluginTensorDesc()
    dynamic.desc, dynamic.min, dynamic.opt, dynamic.max = tensor, low, high, high
    return dynamic


@cache
def accepted_by_ptxas(ptx: str, arch: int) -> str:
    """Returns what ptxas says of a kernel for an architecture: nothing when it takes it."""
    from vstar_engine.kernels.aot.cubin import TOOLS

    target = next(line.split()[1] for line in ptx.splitlines() if line.startswith(".target"))
    tool = TOOLS / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    # PTX for an architecture's own features stays there; sm_80's runs on all that follow
    gpu = target.rstrip(",") if target.rstrip(",").endswith("a") else f"sm_{arch}"
    with TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        done = subprocess.run(
            [tool, f"--gpu-name={gpu}", source, "-o", Path(folder) / "kernel.cubin"], capture_output=True, text=True
        )
    return done.stderr if done.returncode else ""


def walk(request: dict[str, Any]) -> dict[str, Any]:
    """Asks what a builder asks, in its order, of a network of the requested types and shapes."""
    registry = load()
    from vstar_engine.kernels.tensorrt import aot_plugin

    aot_plugin.register(trt, request["arch"])
    creator = registry.get_creator("VstarTemporalAttention", "1", "vstar")
    strict = trt.QuickPluginCreationRequest.STRICT_AOT
    none = trt.PluginFieldCollection([])
    plugin = creator.create_plugin("VstarTemporalAttention", "vstar", none, trt.TensorRTPhase.BUILD, strict)

    kinds = [getattr(trt.DataType, request["type"])] * 3 + [trt.DataType.FLOAT]
    heads, head_dim = request["heads"], request["head_dim"]
    network = [[-1, -1, -1, heads, head_dim]] * 3 + [[request["g_rows"], -1]]
    out_kinds = plugin.get_output_data_types(kinds, [len(dims) for dims in network])
    builder = ExpressionBuilder()

    def dimension(tensor: int, axis: int, size: int) -> Expression:
        return builder.constant(size) if size >= 0 else Expression(lambda shapes: shapes[tensor][axis])

    dims = [Dimensions([dimension(i, j, size) for j, size in enumerate(shape)]) for i, shape in enumerate(network)]
    out_dims = plugin.get_output_shapes(dims, [], builder)

    def shapes(batch: int, frames: int, positions: int) -> Shapes:
        g = [batch if request["g_rows"] == -1 else 1, frames]
        return [[batch, frames, positions, heads, head_dim]] * 3 + [g]

    low, high = shapes(1, 1, 1), shapes(*request["largest"])
    tensors = [*zip(kinds, network, low, high, strict=True), (out_kinds[0], network[0], low[0], high[0])]
    io = [described(*tensor) for tensor in tensors]
    formats = plugin.get_supported_format_combinations(io, 4)
    plugin.configure_plugin(io[:4], io[4:])
    found = []
    for tactic in plugin.get_valid_tactics():
        plugin.set_tactic(tactic)
        launch, arguments = Launch(), Arguments()
        plugin.get_launch_params(dims, io, 4, launch, arguments, builder)
        name, ptx = plugin.get_kernel([x.desc for x in io[:4]], [x.desc for x in io[4:]])
        text = ptx.decode()
        sizes = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")
        at = [shapes(*shape) for shape in request["shapes"]]
        found.append(
            {
                "tactic": tactic,
                "entry": name,
                "parameters": text[text.index(".entry") :].split(")")[0].count(".param ."),
                "reqntid": text.split(".reqntid ")[1].split()[0].rstrip(","),
                "ptxas": [accepted_by_ptxas(text, arch) for arch in request["assembled_for"]],
                "launches": [{size: getattr(launch, size).expr.value(s) for size in sizes} for s in at],
                "arguments": [[argument.expr.value(s) for argument in arguments] for s in at],
            }
        )
    return {
        "version": trt.__version__,
        "output": [out_kinds[0].name, [[d.value(shapes(*s)) for d in out_dims[0]] for s in request["shapes"]]],
        "formats": [[x.type.name, x.format.name] for x in formats],
        "tactics": found,
    }


if __name__ == "__main__":
    print(json.dumps(walk(json.loads(sys.argv[1]))))
